"""How good a pretrained encoder is: lip reading, the table, probes, reports; and whether data are in sync."""
