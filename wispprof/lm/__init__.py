"""Everything that touches torch: verifier engine, draft model, sampling, loading."""
