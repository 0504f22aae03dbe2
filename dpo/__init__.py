"""Direct Preference Optimization in PyTorch Lightning.

raw dialogue -> Pair -> token ids -> Batch (one flat row) -> log-probs -> loss -> metrics -> checkpoint -> export

The way of a raw row to the loss:

- `dialogue`: hh-rlhf text -> turns -> `Pair`, or the named reason why not
- `tokens`: `Pair` -> token ids of the shared prompt and both answers
- `batch`: examples -> one flat row in which every prompt stands once
- `attention`: attention over that row, for any Hugging Face model
- `logps`: the one scorer: a model and a batch -> the log-probability of every answer token
- `losses`: every preference loss as a class with its equation

Around it:

- files to steps: `rows`, `store`, `audit`, `data`, `sampler`; `quickstart` makes files of its own
- models and the step: `models`, `adapters`, `sharing`, `reference`, `cache`, `cached`, `metrics`, `finite`, `slim`,
  `training`, `module`, `sft`, `preflight`
- a run and what it leaves: `run`, `checkpoints`, `loggers`, `callbacks`, `report`, `export`, `cli`, `hub`
"""

__version__ = "0.1.0"
