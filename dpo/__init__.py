"""Direct Preference Optimization in PyTorch Lightning.

raw dialogue -> Pair -> token ids -> Batch (one flat row) -> log-probs -> loss -> metrics -> checkpoint -> export

The way of a raw row to the loss:

- `dialogue`: hh-rlhf text -> turns -> `Pair`, or the named reason why not
- `tokens`: `Pair` -> token ids of the shared prompt and both answers
- `batch`: examples -> one flat row in which every prompt stands once
- `attention`: attention over that row, for any Hugging Face model (`masks`: windows and chunks)
- `logps`: the one scorer: a model and a batch -> the log-probability of every answer token
- `losses`: every preference loss as a class with its equation

Around it:

- files to steps: `listing`, `formats`, `columns`, `rows` (what is read), `store`, `audit` (tokens on disk, counted),
  `texts`, `pairs`, `data`, `prompts` (the data modules), `sampler`; `quickstart` makes files of its own
- models: `models`, `adapters`, `sharing`, `reference`, `cache`, `cached`, `generation`, `precision`, `allocator`
- the step: `training`, `module`, `sft`, `metrics`, `finite`, `slim`, `position`, `schedules`, `preflight`
- a run and what it leaves: `cli`, `words`, `options`, `standard`, `run`, `checkpoints`, `resuming`, `loggers`,
  `callbacks`, `console`, `report`, `online`, `export`, `hub`, `rebuild`, `demo`; then `serving`
"""

__version__ = "0.1.0"
