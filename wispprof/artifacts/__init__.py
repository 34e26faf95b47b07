"""What lies on disk: profiles, traces, estimators, predictors and plans."""
