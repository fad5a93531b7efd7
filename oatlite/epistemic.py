"""Training of the epistemic reward head: a bounded buffer of comparisons, and a few steps on it now and then; and the
head as a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from oatlite.maths.ensemble import EpistemicHead, head_loss


class HeadTrainer:
    """Trains ``head`` on the newest ``buffer_size`` comparisons by Adam.

    ``pull`` is lambda of SEA (arXiv 2411.01493, equation 5): a step of B comparisons, n having been asked for so far,
    weighs the distance from the initialization by ``pull B / n``; with ``is_pull_fixed`` by ``pull`` alone. The
    distance is the mean square over all parameters, where the equation has the squared norm. Batches are drawn by a
    generator of ``seed`` and nothing else, so equal comparisons give equal heads.
    """

    def __init__(
        self,
        head: EpistemicHead,
        *,
        lr: float = 1e-3,
        weight_decay: float = 5e-5,
        num_steps: int = 5,
        batch_size: int = 128,
        pull: float = 0.5,
        is_pull_fixed: bool = False,
        buffer_size: int = 50_000,
        seed: int = 0,
    ) -> None:
        self.head = head
        self._optimizer = torch.optim.Adam(head.parameters(), lr=lr, weight_decay=weight_decay)
        self._num_steps = num_steps
        self._batch_size = batch_size
        self._pull = pull
        self._is_pull_fixed = is_pull_fixed
        self._buffer_size = buffer_size
        self._generator = torch.Generator().manual_seed(seed)
        # A ring that grows up to its bound: comparison i lies at (start + i) mod its length.
        self._ring = torch.empty(0, 2, head.weights[0].shape[1])
        self._start = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, chosen: Tensor, rejected: Tensor) -> None:
        """Take in the features (B, D) of B comparisons; the oldest go where there is no room."""
        new = torch.stack([chosen, rejected], dim=1).float()[-self._buffer_size :]
        needed = min(self._count + len(new), self._buffer_size)
        if needed > len(self._ring):
            bigger = torch.empty(min(max(2 * len(self._ring), needed), self._buffer_size), *new.shape[1:])
            bigger[: self._count] = self._held()
            self._ring, self._start = bigger, 0
        self._ring[self._places(self._count + torch.arange(len(new)))] = new
        num_gone = max(0, self._count + len(new) - len(self._ring))
        self._start = (self._start + num_gone) % max(1, len(self._ring))
        self._count = self._count + len(new) - num_gone

    def _places(self, indices: Tensor) -> Tensor:
        return (self._start + indices) % max(1, len(self._ring))

    def _held(self) -> Tensor:
        """All comparisons, from the oldest to the newest."""
        return self._ring[self._places(torch.arange(self._count))]

    def learn(self, num_queries: int) -> dict[str, float]:
        """The steps that are due after ``num_queries`` comparisons were asked for.

        Gives the mean loss over them and the weight of the pull; nothing before the first comparison.
        """
        count = min(self._batch_size, len(self))
        if not count:
            return {}
        pull = self._pull if self._is_pull_fixed else self._pull * count / max(num_queries, count)
        losses = []
        for _ in range(self._num_steps):
            drawn = torch.randperm(len(self), generator=self._generator)[:count]
            chosen, rejected = self._ring[self._places(drawn)].to(self.head.weights[0].device).unbind(1)
            self._optimizer.zero_grad()
            loss = head_loss(self.head, chosen, rejected, pull=pull)
            loss.backward()
            self._optimizer.step()
            losses.append(loss.detach())
        return {"loss": float(torch.stack(losses).mean()), "pull": pull}

    @torch.no_grad()
    def accuracy(self, chosen: Tensor, rejected: Tensor) -> float:
        """The share of comparisons, features (B, D), whose chosen response has the higher mean reward."""
        device = self.head.weights[0].device
        chosen_rewards, rejected_rewards = (self.head(side.to(device)).mean(0) for side in (chosen, rejected))
        return float((chosen_rewards > rejected_rewards).float().mean())

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name, in CPU memory."""
        state = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        for i, moments in self._optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()}
        state |= {"generator": self._generator.get_state(), "comparisons": self._held()}
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Become what :meth:`state` was of."""
        self.head.load_state_dict(
            {name.removeprefix("head."): tensor for name, tensor in state.items() if name.startswith("head.")}
        )
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            if name.startswith("optimizer."):
                _, index, kind = name.split(".")
                moments.setdefault(int(index), {})[kind] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self._generator.set_state(state["generator"])
        self._ring, self._start = state["comparisons"].clone(), 0
        self._count = len(self._ring)


def save_head(folder: Path, head: EpistemicHead, *, encoder: str) -> None:
    """Write ``head.safetensors`` and ``head.json``, which says how large it is and whose features it reads."""
    num_members, num_features, hidden_size = head.weights[0].shape
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()},
        folder / "head.safetensors",
    )
    about = {"num_features": num_features, "num_members": num_members, "hidden_size": hidden_size, "encoder": encoder}
    (folder / "head.json").write_text(json.dumps(about, indent=2) + "\n")


def load_head(folder: Path) -> EpistemicHead:
    """What :func:`save_head` wrote, on the CPU."""
    about = json.loads((folder / "head.json").read_text())
    head = EpistemicHead(
        about["num_features"], num_members=about["num_members"], hidden_size=about["hidden_size"], seed=0
    )
    head.load_state_dict(load_file(folder / "head.safetensors"))
    return head
