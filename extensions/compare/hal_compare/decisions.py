"""How the figure of a model's task is called, by the kind of model, and what it is run on."""

from __future__ import annotations

#: The task's figure: what is decided, as a plural with its clause, and what is kept of it.
DECISIONS: dict[str, tuple[str, str]] = {
    "embedding": ("{items} whose nearest neighbour", "same neighbour"),
    "causal": ("positions whose next token", "same next token"),
    "seq2seq": ("positions whose next token", "same next token"),
    "classifier": ("decisions whose class", "same class"),
}
#: What the items of each modality are called.
ITEMS: dict[str, str] = {"text": "texts", "image": "images", "audio": "clips"}
#: One of them.
ITEM: dict[str, str] = {"text": "text", "image": "image", "audio": "clip"}
