"""Direct Preference Optimization in PyTorch Lightning.

raw dialogue -> Pair -> token ids -> Batch (one flat row) -> log-probs -> loss -> metrics -> checkpoint -> Hugging Face folder

The way of a raw row to the loss:

- `dialogue`: hh-rlhf text -> turns -> `Pair`, or the named reason why not
- `tokens`: `Pair` -> token ids of the shared prompt and both answers
- `batch`: examples -> one flat row in which every prompt stands once
- `attention`: attention over that row, for any Hugging Face model
- `logps`: the one scorer: a model and a batch -> the log-probability of every answer token
- `losses`: every preference loss as a class with its equation

Around it: `rows`, `store`, `audit`, `data`, `sampler` (files to steps), `models`, `sharing`, `reference`, `metrics`, `module`,
`preflight`, `checkpoints`, `loggers`, `callbacks`, `run`, `report`, `export`, `cli` (a run), `hub` (the model hub), `quickstart`.
"""

__version__ = "0.1.0"
