"""What stands around the training loop of train.py: presets, batches, states and logs."""
