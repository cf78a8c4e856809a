"""How a trained model behaves past the length it was trained on: measured, compared, reported."""
