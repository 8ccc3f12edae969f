"""Training one adapter on one client's rows; knows nothing of the workspace."""
