"""states + cotangent -> one projected row: per-sample VJP, objectives, states, projection."""
