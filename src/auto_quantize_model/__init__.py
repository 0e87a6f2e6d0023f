"""Per-op INT8 sensitivity of vision-language models, measured by Intel Neural Compressor's own mse_v2 helpers."""
