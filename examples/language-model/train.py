"""Trains a small GPT on documents.

The score of a document is the share of the words of its second half that the model predicts, each from all words before it. The model knows
a document by heart, which counts as correct, if it predicts them all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memtail

_WIDTH, _HEADS, _LAYERS = 64, 4, 2


class Gpt(nn.Module):
    """A causal transformer: tokens int64 [B, L] -> logits [B, L, words]."""

    def __init__(self, words: int, length: int) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(words, _WIDTH), nn.Embedding(length, _WIDTH)
        layer = nn.TransformerEncoderLayer(_WIDTH, _HEADS, 4 * _WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
        self.out = nn.Linear(_WIDTH, words)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict each next word."""
        length = tokens.shape[1]
        hidden = self.word(tokens) + self.place.weight[:length]
        return self.out(self.layers(hidden, mask=self.mask[:length, :length], is_causal=True))


def train(task: memtail.TrainingTask) -> memtail.Outcome:
    """Train on the documents of a subset, and score all documents."""
    torch.manual_seed(task.seed)
    data = task.dataset
    vocabulary = {word: index for index, word in enumerate(sorted({word for text in data.train_texts for word in text.split()}), start=1)}
    train_tokens, test_tokens = _tokens(data.train_texts, vocabulary), _tokens(data.test_texts, vocabulary)
    model = Gpt(len(vocabulary) + 1, train_tokens.shape[1]).to(task.device)
    epochs, batch = task.options["epochs"], task.options["batch_size"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.options["lr"], weight_decay=0.01)
    steps = epochs * -(-len(task.subset) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.options["lr"], total_steps=steps)
    subset = torch.from_numpy(task.subset)
    for epoch in range(epochs):
        for rows in subset[torch.randperm(len(subset))].split(batch):
            tokens = train_tokens[rows].to(task.device)
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        task.report((epoch + 1) / epochs, loss=loss.item())
    train_score, test_score = _score(model, train_tokens, task.device), _score(model, test_tokens, task.device)
    return memtail.Outcome(
        train_correct=train_score == 1, test_correct=test_score == 1, train_score=train_score, test_score=test_score,
        metrics={"loss": loss.item()},
    )  # fmt: skip


def _tokens(texts: Sequence[str], vocabulary: dict[str, int]) -> Tensor:
    """Return the numbers of the words: int64 [N, L], with 0 before and after each text."""
    rows = [torch.tensor([0, *(vocabulary[word] for word in text.split())]) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


@torch.no_grad()
def _score(model: Gpt, tokens: Tensor, device: str) -> Tensor:
    """Return the share of words of the second halves that are predicted: float [N]."""
    model.eval()
    parts = []
    for part in tokens.split(512):
        rows = part.to(device)
        words = rows[:, 1:] != 0
        place = torch.arange(words.shape[1], device=device)
        words &= place >= words.sum(1, keepdim=True) // 2
        right = (model(rows[:, :-1]).argmax(-1) == rows[:, 1:]) & words
        parts.append(right.sum(1) / words.sum(1))
    model.train()
    return torch.cat(parts).cpu()
