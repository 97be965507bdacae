"""How good a pretrained encoder is: lip reading, the table, diagnosis, reports; and whether data are in sync."""
