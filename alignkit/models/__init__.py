"""WEIGHTS and tokens: loading, adapters and their lineage, tokenizers, templates and masks, probes."""
