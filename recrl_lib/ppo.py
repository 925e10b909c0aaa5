r"""Shielded PPO: tune the explainer's adapters on a text reward, with the shield in the optimizer.

One iteration, in the order of ``step()``:

1. *Roll out*: sample responses to prompts, keeping log-probs, values and trunk states as they come.
2. *Reward*: the text's score on its last token; on every token ``-kl_coef * (logp - logp_ref)``
   (k1, computed once, no gradient), where the reference is this model with its adapters off.
3. *Advantages*: GAE (gamma 1), whitened over the whole rollout.
4. *Update*: ``ppo_epochs`` x ``minibatches`` real optimizer steps on the clipped surrogate and the
   clipped value loss; gradient clipping, then the shield (its hooks sit on the optimizer).

Conventions, after Huang et al. 2024 (arXiv 2403.17031) where not argued otherwise:

* One boolean mask marks response tokens (EOS included); every mean is over it. Losses are sums over a
  minibatch's tokens divided by its token count, so a long answer does not weigh less per token.
* A response cut off before its EOS pays ``missing_eos_penalty``; its end counts as terminal (no
  bootstrap), as in the reference implementations.
* The value head reads the hidden state before each token, starts at zero, and is detached from the
  trunk: the shield then sees the policy gradient and nothing else.
* The logged KL is k3, ``exp(-x) - 1 + x`` with ``x = logp - logp_ref``, which is never negative (Schulman,
  "Approximating KL Divergence"); the reward uses k1, which is unbiased.
* The reward is in [0, 1] by construction, so it is not normalised again.
* Adam's eps is 1e-5 and there is no weight decay.
* lambda is 1 by default: with a value head that starts at zero, a smaller one would credit late tokens for
  nothing but being late.

Not here yet: checkpoints and resume, micro-batches, an adaptive KL coefficient, several processes.
"""

import resource
import sys
from time import perf_counter

import torch
from torch import Tensor, nn

from recrl_lib.explainer import (
    Explainer, Rollout, messages, prompt_ids, response_hidden, sample, token_logprobs,
)
from recrl_lib.progress import track
from recrl_lib.shield import Shield


# --- the pieces ---------------------------------------------------------------------------------

def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the masked entries; 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def token_rewards(score: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards (B, R): the k1 KL penalty on every token, plus ``score`` (B,) on the last real one."""
    rewards = -kl_coef * (logprobs - reference) * mask
    last = mask.sum(-1) - 1
    rewards[torch.arange(len(score)), last] += score
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, lam: float) -> Tensor:
    """Generalised advantages (B, R), gamma 1, value 0 after the last real token (Schulman et al. 2016)."""
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + next_value - values[:, t]
        real = mask[:, t]
        advantages[:, t] = torch.where(real, delta + lam * next_advantage, 0.0)
        next_advantage = advantages[:, t]
        next_value = torch.where(real, values[:, t], 0.0)
    return advantages


def policy_loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the clipped surrogate over tokens, clipped share, ratios (B, R)) (Schulman et al. 2017, eq. 7)."""
    ratio = (new - old).clamp(-20, 20).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -(torch.minimum(plain, clipped) * mask).sum()
    return loss, masked_mean((clipped < plain).float(), mask), ratio.detach()


def value_loss(new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Sum over tokens of half the larger of the plain and the clipped squared error."""
    near = old + (new - old).clamp(-clip, clip)
    return 0.5 * (torch.maximum((new - returns).square(), (near - returns).square()) * mask).sum()


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Non-negative estimate of KL(policy || reference) per token of the policy's own samples."""
    x = (logprobs - reference).clamp(-20, 20)
    return torch.expm1(-x) + x


class ValueHead(nn.Linear):
    """V(state) from a detached hidden state; starts at 0 everywhere."""

    def __init__(self, width: int):
        super().__init__(width, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.detach().float())


# --- the trainer --------------------------------------------------------------------------------

class PPO:
    """One arm. ``reward(records, texts)`` returns (totals (n,), parts: dict of (n,) arrays).

    ``params`` is a ``config.Params``; ``shield`` is attached to the optimizer for the trainer's life.
    Three generators (prompt order, sampling, minibatches) come from ``seed``, so two arms with equal
    seeds meet the same prompts and the same random numbers.
    """

    def __init__(self, explainer: Explainer, reward, records: list[dict], params, seed: int, shield: Shield | None = None):
        if not explainer.adapter_parameters():
            raise ValueError("the explainer has nothing to train; call add_lora first")
        if len(records) < params.prompts_per_step:
            raise ValueError(f"prompts_per_step={params.prompts_per_step}, but there are only {len(records)} prompts")
        self.explainer, self.reward, self.records, self.params = explainer, reward, records, params
        self.value_head = ValueHead(explainer.lm.config.hidden_size).to(explainer.device)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": explainer.adapter_parameters(), "lr": params.learning_rate},
                {"params": list(self.value_head.parameters()), "lr": params.value_lr},
            ],
            eps=1e-5, weight_decay=0.0,
        )
        self.shield = shield.attach(self.optimizer) if shield else None
        self._order, self._sampling, self._minibatch = (
            torch.Generator().manual_seed(seed * 3 + n) for n in range(3)
        )
        self._queue: list[int] = []
        self.steps_done = self.optimizer_steps = 0

    def train(self, steps: int, desc: str = "ppo") -> list[dict]:
        """``steps`` iterations; one row of statistics each. The shield stays on the optimizer."""
        return [self.step() for _ in track(range(steps), desc)]

    def step(self) -> dict:
        start, shield_before = perf_counter(), self.shield.seconds if self.shield else 0.0
        records = self._next_records()
        prompts = [prompt_ids(self.explainer, messages(r)) for r in records]
        repeated = [r for r in records for _ in range(self.params.samples_per_prompt)]
        rollout = sample(
            self.explainer, prompts, self.params.samples_per_prompt, self.params.max_new_tokens,
            self.params.temperature, self._sampling, self.value_head,
        )
        sampled = perf_counter()
        total, parts = self.reward(repeated, rollout.texts)
        score = torch.as_tensor(total, dtype=torch.float32, device=self.explainer.device)
        score = score - self.params.missing_eos_penalty * ~rollout.ended
        with torch.no_grad(), self.explainer.reference():
            reference = token_logprobs(self.explainer, rollout, self.params.temperature)
        rewards = token_rewards(score, rollout.logprobs, reference, rollout.mask, self.params.kl_coef)
        advantages = gae(rewards, rollout.values, rollout.mask, self.params.gae_lambda)
        returns = advantages + rollout.values
        update = self._update(rollout, masked_whiten(advantages, rollout.mask), returns)
        self.steps_done += 1
        seconds = perf_counter() - start
        tokens = int(rollout.mask.sum())
        residual = masked_mean((returns - rollout.values).square(), rollout.mask)
        spread = masked_mean((returns - masked_mean(returns, rollout.mask)).square(), rollout.mask)
        return {
            "step": self.steps_done,
            "episodes": self.steps_done * len(repeated),
            "reward": float(total.mean()),
            "score": float(score.mean()),  # the reward less missing_eos_penalty: what is optimised
            **{f"reward_{name}": float(part.mean()) for name, part in parts.items()},
            "kl": float((k3(rollout.logprobs, reference) * rollout.mask).sum(-1).mean()),
            "surprisal": float(-masked_mean(rollout.logprobs, rollout.mask)),
            "length": tokens / len(repeated),
            "eos_rate": float(rollout.ended.float().mean()),
            "advantage_std": float(advantages[rollout.mask].std()),  # before whitening
            "explained_variance": float(1 - residual / spread.clamp(min=1e-8)),
            **update,
            "generated_tokens_per_second": tokens / (sampled - start),
            "shield_seconds": (self.shield.seconds if self.shield else 0.0) - shield_before,
            "step_seconds": seconds,
        }

    def _next_records(self) -> list[dict]:
        """The next prompts of a random order that is drawn anew when it runs out."""
        n = self.params.prompts_per_step
        if len(self._queue) < n:
            self._queue = torch.randperm(len(self.records), generator=self._order).tolist()
        chosen, self._queue = self._queue[:n], self._queue[n:]
        return [self.records[i] for i in chosen]

    def _update(self, rollout: Rollout, advantages: Tensor, returns: Tensor) -> dict:
        rows, sums, first_dev = len(rollout.response), [], None
        size = rows // self.params.minibatches
        for _ in range(self.params.ppo_epochs):
            order = torch.randperm(rows, generator=self._minibatch).to(self.explainer.device)
            for n in range(self.params.minibatches):
                chosen = order[n * size:(n + 1) * size]
                statistics, deviation = self._minibatch_step(rollout, chosen, advantages, returns)
                sums.append(statistics)
                if first_dev is None:
                    first_dev = deviation  # sampler and training code must agree: ratio 1 before any step
        means = {key: sum(s[key] for s in sums) / len(sums) for key in sums[0]}
        return {**means, "ratio_first_minibatch_max_dev": first_dev}

    def _minibatch_step(self, rollout: Rollout, rows: Tensor, advantages: Tensor, returns: Tensor) -> tuple[dict, float]:
        part = Rollout(
            rollout.prompt_mask[rows], rollout.response[rows], rollout.mask[rows], rollout.logprobs[rows],
            rollout.values[rows], rollout.states[rows], rollout.ended[rows], [],
        )
        mask, tokens = part.mask, part.mask.sum()
        hidden = response_hidden(self.explainer, part)
        logp = self.explainer.log_softmax(hidden, self.params.temperature)
        new = logp.gather(-1, part.response[..., None])[..., 0].masked_fill(~mask, 0.0)
        pg, clipped, ratio = policy_loss(new, part.logprobs, advantages[rows], mask, self.params.clip_range)
        vf = value_loss(self.value_head(hidden)[..., 0], part.values, returns[rows], mask, self.params.value_clip)
        self.optimizer.zero_grad(set_to_none=True)
        ((pg + vf) / tokens).backward()
        norm = nn.utils.clip_grad_norm_(self.explainer.adapter_parameters(), self.params.max_grad_norm)
        if not torch.isfinite(norm):
            raise RuntimeError(f"step {self.steps_done + 1}: the gradient is not finite; lower learning_rate or kl_coef")
        nn.utils.clip_grad_norm_(self.value_head.parameters(), self.params.max_grad_norm)
        self.optimizer.step()
        self.optimizer_steps += 1
        statistics = {
            "policy_loss": float(pg.detach() / tokens),
            "value_loss": float(vf.detach() / tokens),
            "clip_fraction": float(clipped),
            "approx_kl": float(masked_mean(ratio - 1 - (new - part.logprobs).detach(), mask)),
            "gradient_norm": float(norm),
        }
        return statistics, float(((ratio - 1).abs() * mask).max())


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far: of this process on a CPU, of its tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def summary(rows) -> dict[str, float]:
    """The figures of ``metrics/ppo.json`` from one arm's table of ``step()`` rows."""
    first, last = rows.iloc[0], rows.iloc[-1]
    return {
        "steps": int(last["step"]), "episodes": int(last["episodes"]),
        "reward_first": float(first["reward"]), "reward_last": float(last["reward"]),
        "kl_last": float(last["kl"]), "kl_max": float(rows["kl"].max()), "eos_rate_last": float(last["eos_rate"]),
        "clip_fraction_last": float(last["clip_fraction"]),
        "ratio_first_minibatch_max_dev": float(rows["ratio_first_minibatch_max_dev"].max()),
        "shield_seconds": float(rows["shield_seconds"].mean()), "step_seconds": float(rows["step_seconds"].mean()),
        "generated_tokens_per_second": float(rows["generated_tokens_per_second"].mean()),
    }
