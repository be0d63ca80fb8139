"""The groups of metrics, one file each: the file is named as `evaluate.metrics` and --metric name it."""
