import math

import pytest
import torch

from recrl_lib.ranker import ranking, sasrec
from recrl_lib.tests.ranker.toy import N_ITEMS, TEXT_DIM, cycles, small, some_text


def test_states_read_all_of_the_past_and_nothing_of_the_future_or_of_padding():
    model = small().eval()
    table = model.item_table(None)
    base, future, past = torch.tensor([[[2, 3, 1, 4, 5, 9]]] * 3)
    future[0, 4], past[0, 0] = 7, 8
    moved = (model(base, table) - model(future, table)).abs().amax(-1)[0]
    assert moved[:4].max() == 0 and moved[4] > 1e-4
    assert (model(base, table) - model(past, table))[0, -1].abs().max() > 1e-6
    other = table.clone()
    other[0] = 100.0  # whatever the padding vector is
    padded = torch.tensor([[0, 0, 0, 3, 1, 4]])
    short = model(torch.tensor([[3, 1, 4]]), table)[0]
    assert torch.allclose(short, model(padded, table)[0, 3:], atol=1e-6)
    assert torch.allclose(short, model(padded, other)[0, 3:], atol=1e-6)


def test_a_block_in_plain_loops():
    """The query at place i meets the key at j <= i with the bias of distance i - j."""
    model = small(layers=1).eval()
    with torch.no_grad():
        model.distances.normal_(0, 1, generator=torch.Generator().manual_seed(1))
    table, history = model.item_table(None), torch.tensor([[0, 3, 1, 4, 5]])
    block, x = model.blocks[0], table[history[0]] * math.sqrt(8)
    q, k, v = block.qkv(block.norm_attention(x)).chunk(3, -1)
    attended = torch.zeros(5, 8)
    for h, part in enumerate((slice(4), slice(4, 8))):
        for i in range(1, 5):
            past = range(1, i + 1)
            logits = [q[i, part] @ k[j, part] / 2 + model.distances[i - j, h] for j in past]
            attended[i, part] = torch.stack(logits).softmax(0) @ v[1 : i + 1, part]
    y = x + block.out(attended)
    y = model.norm(y + block.feed_out(torch.nn.functional.gelu(block.feed_in(block.norm_feed(y)))))
    assert torch.allclose(model(history, table)[0, 1:], y[1:], atol=1e-5)


def test_item_table_by_hand():
    model, text = small(TEXT_DIM), some_text()
    text[:, 2] = 7.0  # a constant feature is 0, not NaN
    with pytest.raises(RuntimeError, match="fit_text"):
        model.item_table(text)
    model.fit_text(text)
    table, rows = model.item_table(text), text[1:]
    scaled = (rows - rows.mean(0)) / rows.std(0, correction=0).clamp_min(1e-6) / math.sqrt(TEXT_DIM)
    expected = model.items.weight[1:] + scaled @ model.text.weight.T
    assert torch.allclose(table[1:], expected, atol=1e-5) and table[0].abs().max() == 0
    assert torch.equal(model.item_table(None)[1:], model.items.weight[1:])
    # A tuned text is normalised by the base's constants: its own would take the drift away again
    shift = (model.item_table(text + 1.0) - model.item_table(text))[1:]
    expected = model.text(1.0 / model.text_scale)
    assert expected.abs().max() > 1e-3
    assert torch.allclose(shift, expected.expand_as(shift), atol=1e-6)


def test_blanked_items_leave_evaluation_alone():
    model = small(item_dropout=0.9, dropout=0.0)
    table, histories = model.item_table(None), torch.tensor([[3, 1, 4, 5, 9, 2]])
    assert torch.equal(model.eval()(histories, table), small(dropout=0.0).eval()(histories, table))
    torch.manual_seed(0)
    assert not torch.equal(model.train()(histories, table), model.eval()(histories, table))
    everything = small(item_dropout=1.0, dropout=0.0).train()
    assert torch.equal(everything(histories, table), everything(histories.flip(1), table))


def test_bad_shapes_are_named():
    text, long = some_text(), torch.ones(1, 7, dtype=torch.long)
    for call, problem in (
        (lambda: small(heads=3), "multiple of heads"),
        (lambda: small().item_table(text), r"\(13, 5\), not \(I\+1, text_dim\) = \(13, 0\)"),
        (lambda: small(TEXT_DIM).item_table(text[1:]), r"is \(12, 5\), not .* = \(13, 5\)"),
        (lambda: small()(long, small().item_table(None)), "max_len=6"),
    ):
        with pytest.raises(ValueError, match=problem):
            call()


def test_a_new_item_enters_by_its_text():
    model, text = small(TEXT_DIM), some_text()
    model.fit_text(text)
    rows = torch.stack([text[3], text[8] + 1])
    larger, more = sasrec.add_items(sasrec.freeze(model), text, rows)
    table = larger.item_table(more)
    assert torch.equal(table[: N_ITEMS + 1], model.item_table(text))
    expected = model.text((text[3] - model.text_mean) / model.text_scale)
    assert torch.allclose(table[13], expected, atol=1e-6) and larger.n_items == N_ITEMS + 2


def test_hashes_see_one_bit():
    model, split, text = small(TEXT_DIM), cycles(), some_text()
    model.fit_text(text)
    weights, scores = sasrec.state_sha256(model), ranking.scores_sha256(model, split.train, text)
    assert weights == sasrec.state_sha256(model)
    assert scores == ranking.scores_sha256(model, split.train, text)
    moved = text.clone()
    moved[3, 1] += 1e-4
    assert ranking.scores_sha256(model, split.train, moved) != scores
    with torch.no_grad():
        model.text_mean[0] = torch.nextafter(model.text_mean[0], torch.tensor(math.inf))
    assert sasrec.state_sha256(model) != weights


def test_save_and_load(tmp_path):
    model, text = small(TEXT_DIM, dropout=0.3), some_text()
    model.fit_text(text)
    path = tmp_path / "ranker.safetensors"
    sasrec.save(model, path)
    again = sasrec.load(path)
    assert again.arguments == model.arguments
    assert sasrec.state_sha256(again) == sasrec.state_sha256(model)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("about", ["cut off", None, '{"n_items": 3}', '{"films": 3}'])
def test_load_names_what_is_wrong(tmp_path, about):
    path = tmp_path / "ranker.safetensors"
    with pytest.raises(FileNotFoundError, match="run notebooks/02"):
        sasrec.load(path)
    sasrec.save(small(), path)
    other = sasrec.safetensors_bytes({"x": torch.zeros(2)}, about and {"sasrec": about})
    path.write_bytes(path.read_bytes()[:-100] if about == "cut off" else other)
    with pytest.raises(ValueError, match="ranker.safetensors: not a stored SASRec"):
        sasrec.load(path)
