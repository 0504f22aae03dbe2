"""Direct Preference Optimization in PyTorch Lightning.

raw dialogue -> Pair -> token ids -> Batch (one flat row) -> log-probs -> loss -> metrics -> checkpoint -> export

The way of a raw row to the loss:

- `data.dialogue`: hh-rlhf text -> turns -> `Pair`, or the named reason why not
- `data.tokenization`: `Pair` -> token ids of the shared prompt and both answers
- `models.batch`: examples -> one flat row in which every prompt stands once
- `models.attention`: attention over that row, for any Hugging Face model, windows and chunks included
- `models.scoring`: the one scorer: a model and a batch -> the log-probability of every answer token
- `losses`: every preference loss as a class with its equation

The rooms:

- `losses`, `quickstart` (generated data, the shipped policy and run) and `files` (complete or absent) know no other
- `models`: reading, scoring, sharing prompts, writing answers, adapters, references
- `data`: files, wherever they are -> tokens on disk, counted -> the steps of an optimizer; prompts
- `training`: preference training, the supervised stage, what they measure, the preflight
- `runs`: what a run leaves: its folder, checkpoints, metrics, results, the Hugging Face folder
- `callbacks`: what stands beside training in every run
- `serving`: a server that speaks OpenAI's language, and its page
- `cli`: the command line of training, and what makes the shipped files again
"""

__version__ = "0.1.0"
