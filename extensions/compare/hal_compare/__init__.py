"""`hal compare`: one model on real text, once per device, with error, time and energy side by side.

    from hal_compare import lanes, measure, models, texts
    result = measure.compare(models.load("minilm", "float32"), texts.read([]), lanes.rows_for(["cpu:0"]),
                             repeats=3, batch_size=8, max_length=None, command="")

Importing this package imports neither torch nor transformers.
"""
