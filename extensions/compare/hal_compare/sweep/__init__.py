"""`hal sweep`: a model's error, time and energy over lengths, batches, devices and profiles.

| file | holds |
|---|---|
| `command` | the options, and what is refused before anything is measured |
| `lists` | the whole numbers of `--lengths` and `--batches` |
| `profiles` | devices made of profiles, for as long as a sweep runs |
| `token_texts` | texts of exactly the length asked for |
| `limits` | what a model and the memory allow |
| `cells` | one result: a lane at a length and a batch size |
| `records` | results on disk, from which an interrupted sweep goes on |
| `run` | measuring what is missing, with the time that the rest takes |
| `tables`, `files`, `page`, `curves` | the results as tables, CSV, JSON and a page of charts |

Importing this package imports neither torch nor transformers.
"""
