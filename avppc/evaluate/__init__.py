"""What a pretrained encoder is worth: lip reading, the table, probes, reports; and whether data are in sync."""
