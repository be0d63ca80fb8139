"""The metrics: a file each, named as `evaluate.metrics` and --metric name it, with one `METRIC`."""
