"""Training of the reference pair: the pieces that must be right, on models small enough to run here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from tools.train_reference_pair import distil, train

TINY = train.Shape(hidden=32, layers=1, heads=2, kv_heads=1, mlp=48, head_dim=16, vocab=96)
RECIPE = train.Recipe(steps=8, short=(2, 24), long=(2, 24), decay_share=0.5, warmup=2, save_every=4)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    monkeypatch.setattr(distil, "DRAFT", TINY)
    monkeypatch.setattr(distil, "PROMPT", 8)
    torch.manual_seed(3)
    config = train.Shape(hidden=48, layers=2, heads=2, kv_heads=1, mlp=64, head_dim=16, vocab=96).config()
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def _no_progress(done: int, of: int, loss: float, tokens_per_s: float) -> None:
    pass


def _stream() -> torch.Tensor:
    return torch.randint(2, 96, (4000,), generator=torch.Generator().manual_seed(1))


def test_divergence_is_the_kl_when_every_token_is_kept() -> None:
    torch.manual_seed(0)
    target, draft = torch.randn(2, 5, 40), torch.randn(2, 5, 40)
    log_p, top = target.log_softmax(-1).sort(descending=True)
    whole = F.kl_div(draft.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none")
    found = distil.divergence(draft, top, log_p)
    torch.testing.assert_close(found, whole.sum(-1).mean(), atol=2e-5, rtol=1e-4)


def test_divergence_of_a_part_never_exceeds_the_whole_and_vanishes_at_the_target() -> None:
    torch.manual_seed(0)
    target, draft = 3 * torch.randn(50, 40), 3 * torch.randn(50, 40)
    log_p, top = target.log_softmax(-1).sort(descending=True)
    whole = distil.divergence(draft, top, log_p)
    previous = torch.tensor(0.0)
    for kept in (1, 4, 16, 40):
        part = distil.divergence(draft, top[:, :kept], log_p[:, :kept])
        assert previous - 1e-5 <= part <= whole + 1e-5
        previous = part
    assert abs(distil.divergence(target, top[:, :8], log_p[:, :8]).item()) < 1e-5


def test_orthogonalised_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((24, 40), (40, 24)):
        matrix = torch.randn(shape) @ torch.diag(torch.linspace(0.2, 3.0, shape[1]))
        values = torch.linalg.svdvals(train.orthogonalised(matrix))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_principal_components_keep_the_geometry_of_a_low_rank_embedding() -> None:
    torch.manual_seed(0)
    embedding = torch.randn(60, 8) @ torch.randn(8, 32)
    embedding = embedding - embedding.mean(0)
    small = distil.principal_components(embedding, 8)
    similarity = F.cosine_similarity(small[:, None], small[None], dim=-1)
    wanted = F.cosine_similarity(embedding[:, None], embedding[None], dim=-1)
    torch.testing.assert_close(similarity, wanted, atol=1e-4, rtol=1e-3)
    assert small.square().mean() == pytest.approx(embedding.square().mean().item(), rel=1e-4)


def test_half_of_the_own_text_is_the_targets_greedy_choice(tiny: LlamaForCausalLM) -> None:
    texts = distil.write_text(tiny, _stream(), rows=4, length=20, seed=5)
    assert texts.shape == (4, 20)
    choice = tiny(texts).logits.argmax(-1)[:, distil.PROMPT - 1 : -1]
    follows = (choice == texts[:, distil.PROMPT :]).all(1).tolist()
    assert follows[:2] == [True, True]
    assert not all(follows[2:])


def test_teacher_logits_are_those_of_the_target(tiny: LlamaForCausalLM, tmp_path: Path) -> None:
    texts = distil.write_text(tiny, _stream(), rows=6, length=16, seed=5)
    logits = distil.query_teacher(tiny, texts, rows=4, progress=_no_progress)
    distil.save_logits(logits, tmp_path / "deep" / "logits.pt")
    again = distil.load_logits(tmp_path / "deep" / "logits.pt")
    tokens, top, log_p = again.batch(3, 2, seed=0)
    row = [r.tolist() for r in texts].index(tokens[0].tolist())
    wanted = tiny(texts[row : row + 1]).logits[0].log_softmax(-1).gather(-1, top[0])
    torch.testing.assert_close(log_p[0], wanted, atol=5e-3, rtol=1e-3)


def test_a_draft_comes_nearer_to_its_target_and_resumes_where_it_stopped(
    tiny: LlamaForCausalLM, tmp_path: Path
) -> None:
    texts = distil.write_text(tiny, _stream(), rows=8, length=24, seed=5)
    logits = distil.query_teacher(tiny, texts, rows=4, progress=_no_progress)

    def draft(folder: str, losses: list[float], stop_at: int | None = None) -> LlamaForCausalLM:
        def progress(step: int, steps: int, loss: float, speed: float) -> None:
            losses.append(loss)
            if step == stop_at:
                raise KeyboardInterrupt

        return distil.train_draft(tiny, logits, logits, RECIPE, tmp_path / folder, progress, resume=True)

    whole: list[float] = []
    straight = draft("straight", whole)
    assert whole[-1] < whole[0]
    with pytest.raises(KeyboardInterrupt):
        draft("stopped", [], stop_at=6)
    rest: list[float] = []
    resumed = draft("stopped", rest)
    assert len(rest) == 4
    torch.testing.assert_close(rest, whole[4:])
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b)
