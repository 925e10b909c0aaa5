import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recrl_lib.data.splits import Split
from recrl_lib.params import Params
from recrl_lib.ranker import metrics, ranking, sasrec, training
from recrl_lib.ranker.metrics import hr_at
from recrl_lib.ranker.sasrec import SASRec

N_ITEMS, TEXT_DIM = 12, 5


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("RECRL_PROGRESS", "off")


def small(text_dim=0, **changes):
    arguments = dict(
        n_items=N_ITEMS, dim=8, layers=2, heads=2, max_len=6, dropout=0.2, text_dim=text_dim
    )
    return SASRec(**{**arguments, **changes})


def some_text(seed=0):
    text = torch.randn(N_ITEMS + 1, TEXT_DIM, generator=torch.Generator().manual_seed(seed)) * 3 + 2
    text[0] = 0
    return text


def cycles(n_users=40, n_items=N_ITEMS, seed=0):
    """Users who walk round the items in order: the next item follows from the last."""
    rng = np.random.default_rng(seed)
    walks = [
        (rng.integers(n_items) + np.arange(rng.integers(4, 10))) % n_items + 1
        for _ in range(n_users)
    ]
    return Split(
        [w[:-2] for w in walks], np.array([w[-2] for w in walks]), np.array([w[-1] for w in walks])
    )


def fit(model, split, text=None, seed=0, **changes):
    settings = dict(lr=1e-2, batch=8, epochs=4, patience=4)
    return training.train(model, split, text, seed=seed, **{**settings, **changes})


# the model


def test_states_do_not_depend_on_the_future():
    model = small().eval()
    table = model.item_table(None)
    a, b = torch.tensor([[0, 3, 1, 4, 5, 9]]), torch.tensor([[0, 3, 1, 4, 2, 7]])
    same = (model(a, table) - model(b, table)).abs().amax(-1)[0]
    assert same[1:4].max() == 0 and same[4] > 1e-4


def test_states_depend_on_all_of_the_past():
    model = small().eval()
    table = model.item_table(None)
    a, b = torch.tensor([[2, 3, 1, 4, 5, 9]]), torch.tensor([[8, 3, 1, 4, 5, 9]])
    assert (model(a, table) - model(b, table))[0, -1].abs().max() > 1e-6


def test_padding_does_not_leak():
    model = small().eval()
    table = model.item_table(None)
    short = model(torch.tensor([[3, 1, 4]]), table)
    long = model(torch.tensor([[0, 0, 0, 3, 1, 4]]), table)
    assert torch.allclose(short[0], long[0, 3:], atol=1e-6)
    other = table.clone()
    other[0] = 100.0  # whatever the padding vector is
    assert torch.allclose(
        model(torch.tensor([[0, 0, 0, 3, 1, 4]]), other)[0, 3:], long[0, 3:], atol=1e-6
    )


def test_a_head_adds_its_bias_for_the_distance():
    """One block in plain loops: the query at place i meets the key at j <= i with the bias of i - j."""
    model = small(layers=1).eval()
    with torch.no_grad():
        model.distances.normal_(0, 1, generator=torch.Generator().manual_seed(1))
    table, history = model.item_table(None), torch.tensor([[0, 3, 1, 4, 5]])
    block, x = model.blocks[0], table[history[0]] * math.sqrt(8)
    q, k, v = block.qkv(block.norm_attention(x)).chunk(3, -1)
    attended = torch.zeros(5, 8)
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        for i in range(1, 5):
            logits = torch.stack(
                [q[i, part] @ k[j, part] / 2 + model.distances[i - j, h] for j in range(1, i + 1)]
            )
            attended[i, part] = logits.softmax(0) @ v[1 : i + 1, part]
    y = x + block.out(attended)
    y = model.norm(y + block.feed_out(torch.nn.functional.gelu(block.feed_in(block.norm_feed(y)))))
    assert torch.allclose(model(history, table)[0, 1:], y[1:], atol=1e-5)


def test_untrained_heads_look_less_far_the_lower_their_number():
    """With two heads biases start at 0 for the item itself and fall by 2^-3 and 2^-6 a step."""
    assert torch.allclose(
        small(max_len=3).distances, torch.tensor([[0, 0], [-1 / 8, -1 / 64], [-2 / 8, -2 / 64]])
    )


def test_attention_equals_a_naive_twin():
    block = sasrec.Block(8, 2, dropout=0.0).eval()
    x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    heads = []
    q, k, v = block.qkv(block.norm_attention(x[0])).chunk(3, -1)
    for h in (slice(0, 4), slice(4, 8)):
        logits = (q[:, h] @ k[:, h].T / math.sqrt(4)).masked_fill(~mask, -math.inf)
        heads.append(logits.softmax(-1) @ v[:, h])
    y = x[0] + block.out(torch.cat(heads, -1))
    y = y + block.feed_out(torch.nn.functional.gelu(block.feed_in(block.norm_feed(y))))
    assert torch.allclose(block(x, mask[None, None])[0], y, atol=1e-6)


def test_item_table_by_hand():
    model, text = small(TEXT_DIM), some_text()
    with pytest.raises(RuntimeError, match="fit_text"):
        model.item_table(text)
    model.fit_text(text)
    table = model.item_table(text)
    rows = text[1:].numpy()
    e, w = model.items.weight[1:].detach().numpy(), model.text.weight.detach().numpy()
    expected = e + (rows - rows.mean(0)) / rows.std(0) / math.sqrt(TEXT_DIM) @ w.T
    np.testing.assert_allclose(table[1:].detach().numpy(), expected, atol=1e-5)
    assert table[0].abs().max() == 0
    assert torch.equal(model.item_table(None)[1:], model.items.weight[1:])


def test_tuned_text_is_normalised_by_the_constants_of_the_base():
    model, text = small(TEXT_DIM), some_text()
    model.fit_text(text)
    shifted = text + 1.0  # its own mean would take the drift away again
    shift = (model.item_table(shifted) - model.item_table(text))[1:]
    expected = model.text(1.0 / model.text_scale)
    assert expected.abs().max() > 1e-3 and torch.allclose(
        shift, expected.expand_as(shift), atol=1e-6
    )


def test_a_constant_text_feature_is_no_nan():
    model, text = small(TEXT_DIM), some_text()
    text[:, 2] = 7.0
    model.fit_text(text)
    assert model.item_table(text).isfinite().all()


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match="multiple of heads"):
        small(heads=3)
    with pytest.raises(ValueError, match="text_dim=0"):
        small().item_table(some_text())
    with pytest.raises(ValueError, match=r"expected \(I\+1, text_dim\) = \(13, 5\)"):
        small(TEXT_DIM).fit_text(some_text()[1:])
    with pytest.raises(ValueError, match="max_len=6"):
        small()(torch.ones(1, 7, dtype=torch.long), small().item_table(None))


def test_pad_sequences():
    padded = ranking.pad_sequences([np.array([1, 2]), np.array([], dtype=int), np.arange(1, 6)], 3)
    assert padded.tolist() == [[0, 1, 2], [0, 0, 0], [3, 4, 5]] and padded.dtype == torch.int64


# training


@pytest.mark.parametrize("width", [2, 3, 5, 50])
def test_windows_hold_every_transition_once(width):
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 100, n) for n in (1, 2, 3, 4, 5, 9, 23)]
    expected = sorted((int(a), int(b)) for s in sequences for a, b in zip(s[:-1], s[1:]))
    cuts = set()
    for _ in range(5):
        windows = training._windows(sequences, width, rng).numpy()
        assert windows.shape[1] == width
        pairs = [(int(a), int(b)) for row in windows for a, b in zip(row[:-1], row[1:]) if a]
        assert sorted(pairs) == expected
        assert all(
            (np.diff((row > 0).astype(int)) >= 0).all() for row in windows
        )  # padded on the left only
        cuts.add(windows.tobytes())
    assert (len(cuts) > 1) == (2 < width < 23)


def test_training_learns_and_keeps_the_best_epoch():
    split, model = cycles(), small()
    curve = fit(model, split, epochs=12, patience=3)
    best = max(row["valid_ndcg@10"] for row in curve)
    assert curve[-1]["loss"] < curve[0]["loss"] and best > 0.6
    assert [row["epoch"] for row in curve] == list(range(1, len(curve) + 1))
    ranks = ranking.target_ranks(model, split.train, split.valid, None)
    assert metrics.ndcg_at(ranks, 10).mean() == best
    assert hr_at(ranking.target_ranks(model, split.with_valid, split.test, None), 1).mean() > 0.5
    assert not model.training


def test_training_on_a_sample_of_the_items_learns_too(monkeypatch):
    monkeypatch.setattr(training, "FULL_SOFTMAX_ITEMS", N_ITEMS - 1)
    monkeypatch.setattr(training, "NEGATIVES", 6)
    split, text, model = cycles(), some_text(), small(TEXT_DIM)
    model.fit_text(text)
    curve = fit(model, split, text, epochs=12, patience=12)
    assert max(row["valid_ndcg@10"] for row in curve) > 0.6


def test_the_noise_gives_every_item_a_chance_and_padding_none():
    noise = training._noise([np.array([1, 3]), np.array([3])], 4)
    assert torch.allclose(noise, torch.tensor([0, 2, 1, 3, 1]) / 7)


def test_the_average_by_hand():
    kept, model = small(), small(seed=1)
    expected = {
        n: 0.75 * a + 0.25 * b for (n, a), b in zip(kept.named_parameters(), model.parameters())
    }
    training._average(kept, model, 0.75)
    for name, value in kept.named_parameters():
        assert torch.allclose(value, expected[name], atol=1e-7), name


def test_blanked_items_leave_evaluation_alone():
    model = small(item_dropout=0.9, dropout=0.0)
    table, histories = model.item_table(None), torch.tensor([[3, 1, 4, 5, 9, 2]])
    assert torch.equal(model.eval()(histories, table), small(dropout=0.0).eval()(histories, table))
    torch.manual_seed(0)
    assert not torch.equal(model.train()(histories, table), model.eval()(histories, table))
    everything = small(item_dropout=1.0, dropout=0.0).train()
    others = torch.tensor([[7, 7, 1, 1, 2, 2]])
    assert torch.equal(everything(histories, table), everything(others, table))


def test_fit_is_the_ranker_of_the_parameters():
    params = Params(
        ranker_dim=8, ranker_layers=1, ranker_max_len=6, ranker_epochs=2, ranker_item_dropout=0.3
    )
    split, text = cycles(), some_text()
    model, curve = training.fit(params, split, N_ITEMS, text, seed=3)
    twin = SASRec(N_ITEMS, 8, 1, 2, 6, params.ranker_dropout, TEXT_DIM, seed=3, item_dropout=0.3)
    twin.fit_text(text)
    rows = fit(
        twin,
        split,
        text,
        seed=3,
        lr=params.ranker_lr,
        batch=params.ranker_batch,
        epochs=2,
        average=params.ranker_average,
    )
    assert curve == rows and sasrec.state_sha256(model) == sasrec.state_sha256(twin)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    plain, _ = training.fit(params, split, N_ITEMS, None, seed=3)
    assert plain.text is None


def test_users_who_are_not_evaluated_teach_too():
    """The evaluated users' single training items hold no transition, so all that is learned is the others'."""
    walks = cycles()
    split = Split(
        [items[-1:] for items in walks.train], walks.valid, walks.test, others=tuple(walks.train)
    )
    model = small()
    fit(model, split, epochs=12)
    assert hr_at(ranking.target_ranks(model, split.train, split.valid, None), 1).mean() > 0.5


def test_training_stops_early():
    curve = fit(small(), cycles(), lr=0.0, epochs=20, patience=3)
    assert len(curve) == 4  # epoch 1 is the best, then three without a better one


def test_training_is_reproducible_whatever_the_global_state():
    split, text = cycles(), some_text()
    hashes = []
    for global_seed, seed in ((1, 0), (2, 0), (2, 5)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        model = small(TEXT_DIM)
        model.fit_text(text)
        curve = fit(model, split, text, seed=seed, epochs=2)
        hashes.append(
            (
                sasrec.state_sha256(model),
                ranking.scores_sha256(model, split.train, text),
                str(curve),
            )
        )
    assert hashes[0] == hashes[1]
    assert all(a != b for a, b in zip(hashes[1], hashes[2]))
    model = small()
    before = torch.get_rng_state()
    fit(model, split, epochs=1)
    assert torch.equal(before, torch.get_rng_state())
    assert sasrec.state_sha256(small(seed=1)) != sasrec.state_sha256(small(seed=0))


# ranking


def test_ranks_equal_a_naive_twin_with_ties_against_us():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.integers(0, 4, (30, N_ITEMS + 1)).astype(np.float32))
    scores[:, 0] = -torch.inf
    seen = [rng.choice(np.arange(1, N_ITEMS), 4, replace=False) for _ in range(30)]
    targets = np.full(30, N_ITEMS)
    ranks = ranking.ranks_of([(0, scores[:20].clone()), (20, scores[20:].clone())], seen, targets)
    for user in range(30):
        others = [i for i in range(1, N_ITEMS) if i not in seen[user]]
        assert ranks[user] == 1 + sum(scores[user, i] >= scores[user, N_ITEMS] for i in others)
    constant = torch.zeros(1, N_ITEMS + 1)
    constant[:, 0] = -torch.inf
    assert ranking.ranks_of([(0, constant)], seen[:1], targets[:1]) == N_ITEMS - 4  # the last place


def test_ranks_refuse_nan_and_seen_targets():
    with pytest.raises(RuntimeError, match="NaN scores for users 0..0"):
        ranking.ranks_of([(0, torch.full((1, 4), torch.nan))], [np.array([1])], np.array([2]))
    with pytest.raises(ValueError, match="target item 1 of user 1"):
        ranking.ranks_of([(0, torch.zeros(2, 4))], [np.array([2]), np.array([1])], np.array([1, 1]))


def test_chunks_cover_all_users_and_do_not_mask_history():
    model, split = small().eval(), cycles()
    whole = [scores for _, scores in ranking.score_chunks(model, split.train, None, chunk=1000)]
    parts = list(ranking.score_chunks(model, split.train, None, chunk=7))
    assert [start for start, _ in parts] == list(range(0, 40, 7))
    scores = torch.cat([s for _, s in parts])
    assert scores.shape == (40, N_ITEMS + 1) and scores.dtype == torch.float32
    assert torch.allclose(scores, whole[0], atol=1e-6)
    assert scores[:, 0].isneginf().all() and scores[:, 1:].isfinite().all()


def test_top_k_equals_a_naive_twin_and_agrees_with_the_ranks():
    model, split = small().eval(), cycles()
    top = ranking.top_k(model, split.train, None, 3)
    _, scores = next(ranking.score_chunks(model, split.train, None))
    for user, items in enumerate(split.train):
        unseen = [i for i in range(1, N_ITEMS + 1) if i not in items]
        assert top[user].tolist() == sorted(unseen, key=lambda i: (-scores[user, i], i))[:3]
    for place in range(3):
        assert (ranking.target_ranks(model, split.train, top[:, place], None) == place + 1).all()
    with pytest.raises(ValueError, match="fewer than k=11"):
        ranking.top_k(model, split.train, None, 11)


def test_top_k_breaks_ties_by_item_id():
    model = small().eval()
    with torch.no_grad():
        model.items.weight.zero_()
    assert ranking.top_k(model, [np.array([2])], None, 3).tolist() == [[1, 3, 4]]


class Tied(SASRec):
    """Scores from small whole numbers, so that they are exact and often tie: a state for each history, at random."""

    def __init__(self, n_items, seed):
        super().__init__(n_items, 3, 1, 1, max_len=n_items)
        self.seed = seed
        self.table = torch.randint(
            -1, 2, (n_items + 1, 3), generator=torch.Generator().manual_seed(seed)
        ).float()

    def frozen_table(self, text):
        return self.table

    def forward(self, histories, table):
        seeds = [[self.seed, *h[h > 0]] for h in histories.numpy()]
        return torch.from_numpy(
            np.stack([np.random.default_rng(s).integers(-1, 2, (1, 3)) for s in seeds])
        ).float()


@given(
    n_items=st.integers(4, 30),
    seed=st.integers(0, 10**6),
    users=st.integers(1, 10),
    items=st.integers(1, 35),
    k=st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_ranking_in_blocks_equals_the_full_matrix(n_items, seed, users, items, k):
    rng, model = np.random.default_rng(seed), Tied(n_items, seed)
    drawn = [
        rng.permutation(np.arange(1, n_items + 1))[: rng.integers(2, n_items)] for _ in range(8)
    ]
    sequences, targets = [d[:-1] for d in drawn], np.array([d[-1] for d in drawn])
    scores = (model(ranking.pad_sequences(sequences, n_items), None)[:, 0] @ model.table.T).numpy()
    unseen = [[i for i in range(1, n_items + 1) if i not in s] for s in sequences]
    best = [sorted(rest, key=lambda i: (-row[i], i))[:k] for row, rest in zip(scores, unseen)]
    enough = [u for u in range(8) if len(unseen[u]) >= k]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "USERS", users)
        patch.setattr(ranking, "ITEMS", items)
        ranks = ranking.target_ranks(model, sequences, targets, None)
        top, top_scores = ranking.rank(model, [sequences[u] for u in enough], k, None)
    assert ranks.tolist() == [
        sum(row[i] >= row[t] for i in rest) for row, rest, t in zip(scores, unseen, targets)
    ]
    assert top.tolist() == [best[u] for u in enough]
    assert top_scores.tolist() == [[scores[u, i] for i in best[u]] for u in enough]


def test_blocks_give_the_ranks_of_the_whole_rows(monkeypatch):
    model, split = small().eval(), cycles()
    whole = ranking.ranks_of(
        ranking.score_chunks(model, split.train, None), split.train, split.valid
    )
    monkeypatch.setattr(ranking, "ITEMS", 5)
    assert ranking.target_ranks(model, split.train, split.valid, None).tolist() == whole.tolist()


def test_rank_takes_users_that_training_never_saw():
    model = small().eval()
    items, scores = ranking.rank(model, [[3, 4], [1]], 2, None)
    assert items.shape == scores.shape == (2, 2) and (np.diff(scores) <= 0).all()
    assert not set(items[0]) & {3, 4} and items.dtype == np.int64
    for history in ([], [0], [13], [-1]):
        with pytest.raises(
            ValueError, match=r"history 1 must hold at least one item, all of them in 1\.\.12"
        ):
            ranking.rank(model, [[1], history], 2, None)


def test_a_new_item_enters_by_its_text(tmp_path):
    model, text = small(TEXT_DIM), some_text()
    model.fit_text(text)
    sasrec.freeze(model)
    rows = torch.stack([text[3], text[8] + 1])
    larger, more = sasrec.add_items(model, text, rows)
    table = larger.item_table(more)
    assert (
        torch.equal(table[: N_ITEMS + 1], model.item_table(text)) and larger.n_items == N_ITEMS + 2
    )
    assert torch.allclose(
        table[13], model.text((text[3] - model.text_mean) / model.text_scale), atol=1e-6
    )
    sasrec.save(larger, tmp_path / "larger.safetensors")
    again = sasrec.load(tmp_path / "larger.safetensors")
    assert (
        ranking.rank(again, [[1, 13]], 3, more)[0].tolist()
        == ranking.rank(larger, [[1, 13]], 3, more)[0].tolist()
    )
    with pytest.raises(ValueError, match=r"expected \(n, text_dim\) = \(n, 5\)"):
        sasrec.add_items(model, text, rows[:, :3])
    with pytest.raises(ValueError, match="text_dim=0"):
        sasrec.add_items(small(), text, rows)


def test_hashes_see_one_bit():
    model, split, text = small(TEXT_DIM), cycles(), some_text()
    model.fit_text(text)
    weights, scores = sasrec.state_sha256(model), ranking.scores_sha256(model, split.train, text)
    assert (weights, scores) == (
        sasrec.state_sha256(model),
        ranking.scores_sha256(model, split.train, text),
    )
    moved = text.clone()
    moved[3, 1] += 1e-4
    assert ranking.scores_sha256(model, split.train, moved) != scores
    with torch.no_grad():
        model.text_mean[0] = torch.nextafter(model.text_mean[0], torch.tensor(math.inf))
    assert sasrec.state_sha256(model) != weights


def test_save_and_load(tmp_path):
    model, split, text = small(TEXT_DIM, dropout=0.3), cycles(), some_text()
    model.fit_text(text)
    path = tmp_path / "ranker.safetensors"
    sasrec.save(model, path)
    again = sasrec.load(path)
    assert again.arguments == model.arguments and [p.name for p in tmp_path.iterdir()] == [
        path.name
    ]
    assert sasrec.state_sha256(again) == sasrec.state_sha256(model)
    assert ranking.scores_sha256(again, split.train, text) == ranking.scores_sha256(
        model, split.train, text
    )
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_load_names_what_is_wrong(tmp_path):
    path = tmp_path / "ranker.safetensors"
    with pytest.raises(FileNotFoundError, match="run the ranker notebook"):
        sasrec.load(path)
    sasrec.save(small(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="ranker.safetensors: not a whole safetensors file"):
        sasrec.load(path)
    path.write_bytes(sasrec.safetensors_bytes({"x": torch.zeros(2)}))
    with pytest.raises(ValueError, match="no SASRec in this file"):
        sasrec.load(path)
    path.write_bytes(
        sasrec.safetensors_bytes({"x": torch.zeros(2)}, metadata={"sasrec": '{"n_items": 3}'})
    )
    with pytest.raises(ValueError, match="weights do not fit"):
        sasrec.load(path)
