"""What a pretrained encoder is worth: lip reading, reports."""
