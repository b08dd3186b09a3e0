"""`hal compare`: one model on real text, once per device, with error, time and energy side by side."""
