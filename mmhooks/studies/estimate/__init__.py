"""What a study would need on a GPU: hours and gigabytes a stage, counted on models without weights."""
