"""The evaluate room: how good a model is, one metric a file, every figure with n and interval; trains nothing."""
