"""The encoders: of pictures, which is what pretraining gives, and of sound, which is trained beside it."""
