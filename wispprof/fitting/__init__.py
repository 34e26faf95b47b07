"""Verification-time estimators and rejection predictors, with their held-out evaluation."""
