"""What a trained model says of a video file. Needs no TensorFlow."""
