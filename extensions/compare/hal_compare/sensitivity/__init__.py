"""`hal sensitivity`: what moves a model's result most: figures of a simulated device's profile, or layers of the model.

| file | holds |
|---|---|
| `command` | the command line |
| `trial` | one run of a model on a device: its error, time and energy |
| `tornado` | one figure of the profile at a time at the ends of its interval |
| `model_layers` | one layer of the model at a time with the device's errors, noise or fewer bits |
| `tables`, `page` | both as tables for the terminal, and as a page |

Importing this package imports neither torch nor transformers.
"""
