"""One file a measure: its result, its Metric, its function. No model is imported here."""
