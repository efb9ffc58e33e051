"""Training: from data and a published checkpoint to weights that the server serves. Needs the extra `ossia[train]`."""
