"""`verify`: how much noise the options put into the gradients of a model."""
