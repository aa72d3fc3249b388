"""Other ways to train the same model, estimated or measured side by side."""
