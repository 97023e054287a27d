"""Zero-shot evaluation on arrays: scores, metrics, intervals, the modality gap, the report."""
