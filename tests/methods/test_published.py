"""Labels of the published code on real rows, where checkouts of it are (`published`)."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from scipy import sparse
from torch.nn.functional import normalize, one_hot

from tests.methods.published import checkout, imported
from transclip_fast.methods import METHODS

STATA_STUBS = {"clip": {}, "tqdm": {"tqdm": iter}, "yaml": {}, "ftfy": {}}  # that do no work
TC, STATA, EMD, ECALP = "transduction-for-vlms", "StatA", "transductive-CLIP", "ECALP"
ZLAP = "ZLaP"


def needs(repository):
    reason = f"TRANSCLIP_PUBLISHED has no {repository}"
    return pytest.mark.skipif(checkout(repository) is None, reason=reason)


@pytest.fixture
def few_shot(golden):
    """Queries, texts, 4 shots a class and their labels, classes in turn, and true labels."""
    x = normalize(torch.from_numpy(golden["image_features"]).float(), dim=1)
    t = normalize(torch.from_numpy(golden["text_features"]).float(), dim=1)
    labels = torch.from_numpy(golden["labels"])
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    shots = torch.cat([order[labels[order] == k][:4] for k in range(len(t))])
    others = torch.ones(len(labels), dtype=torch.bool)
    others[shots] = False
    return x[others], t, x[shots], labels[shots]


def ours(name, few_shot, *, texts=False, **settings):
    x, t, s, y = few_shot
    shots = {} if texts else {"support_features": s, "support_labels": y}
    model = METHODS[name](device="cpu", **settings)
    return model.fit(x, text_features=t, **shots).transduction_


def same(found, published):
    np.testing.assert_array_equal(found, published)


@needs(TC)
@pytest.mark.parametrize(
    ("name", "module", "kind", "settings", "theirs"),
    [
        ("bd-cspn", "proto_rect", "BDCSPN", {}, {}),
        ("laplacianshot", "laplacian_shot", "LaplacianShot", {}, {}),
        (
            "laplacianshot",
            "laplacian_shot",
            "LaplacianShot",
            {"n_neighbors": 10, "smoothness": 1.5},
            {"knn": 10, "lambda_regularization": 1.5},
        ),
        ("tim-adm", "tim", "TIM_ADM_bis", {}, {}),
        ("pt-map", "pt_map", "PTMAP", {}, {}),
        ("pt-map", "pt_map", "PTMAP", {"rate": 0.4}, {"fine_tuning_lr": 0.4}),
        ("transductive-finetuning", "transductive_finetuning", "TransductiveFinetuning", {}, {}),
    ],
)
def test_few_shot(few_shot, name, module, kind, settings, theirs):
    x, _, s, y = few_shot
    with imported(TC, f"baselines.{module}") as published:
        model = getattr(published, kind)(torch.nn.Identity(), feature_normalization=2, **theirs)
        model.process_support_set(s, y)
        answer = model(x).detach()
    same(ours(name, few_shot, **settings), answer.argmax(1))


@needs(STATA)
def test_stata(few_shot):
    x, t, *_ = few_shot
    with imported(STATA, "solvers.StatA", STATA_STUBS) as published:
        cuda = mock.patch.object(torch.nn.Module, "cuda", lambda self: self)
        with cuda, torch.no_grad():
            _, z = published.StatA_solver(x, torch.zeros(len(x)).long(), t.T[None].clone())
    same(ours("stata", few_shot, texts=True), z.argmax(1))


@needs(STATA)
def test_hard_em_dirichlet(few_shot):
    x, t, *_ = few_shot
    with imported(STATA, "solvers.Dirichlet", STATA_STUBS) as published:
        # Batched over tasks; it takes the number of classes from the number of texts' tasks.
        _, z = published.Dirichlet_solver(x[None], torch.zeros(len(x)).long(), t.T[None].clone())
    same(ours("hard-em-dirichlet", few_shot, texts=True), z.argmax(1))


@needs(EMD)
@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [("tim-gd", "TIM_GD", {}), ("alpha-tim", "ALPHA_TIM", {"alpha": 2.0})],
)
def test_tim_by_gradients(few_shot, name, kind, settings):
    x, _, s, y = few_shot
    weights = [0.1, 1.0, 0.1] if name == "tim-gd" else [1.0, 1.0, 1.0]
    arguments = SimpleNamespace(
        iter=200,
        loss_weights=weights,
        temp=15,
        T=30,
        lr_tim=1e-4,
        lr_alpha_tim=1e-4,
        entropies=["Shannon", "Alpha", "Alpha"],
        alpha_value=settings.get("alpha"),
        num_classes_test=int(y.max()) + 1,
    )
    quiet = SimpleNamespace(info=print, del_logger=print)

    def hot(labels, n_classes):
        return one_hot(labels, n_classes).float()

    entries = {"get_one_hot": hot, "Logger": lambda *_: quiet, "clip_weights": None}
    with imported(EMD, "src.methods.few_shot.tim", {"src.utils": entries}) as published:
        network = SimpleNamespace(eval=print, train=print)
        method = getattr(published, kind)(network, "cpu", "", arguments)
        others = torch.zeros(1, len(x)).long()
        method.run_method(support=s[None], query=x[None], y_s=y[None], y_q=others)
        answer = method.get_logits(x[None])[0].detach()
    same(ours(name, few_shot, max_iter=200, **settings), answer.argmax(1))


@needs(EMD)
@pytest.mark.parametrize("name", ["em-dirichlet", "hard-em-dirichlet"])
def test_few_shot_em_dirichlet(few_shot, name):
    x, t, s, y = few_shot
    f, f_s = ((30 * rows @ t.T).softmax(1)[None] for rows in (x, s))
    arguments = SimpleNamespace(
        iter=5,
        iter_mm=1000,
        num_classes_test=len(t),
        k_eff=len(t) + 1,  # share_weight 0
        n_query=len(x),
        T=30,
        use_softmax_feature=True,
    )
    quiet = SimpleNamespace(info=print, del_logger=print)

    def hot(labels, n_classes):
        return one_hot(labels, n_classes).float()

    entries = {"get_one_hot": hot, "Logger": lambda *_: quiet, "clip_weights": None}
    module = f"src.methods.few_shot.{name.replace('-', '_')}"
    with imported(EMD, module, {"src.utils": entries}) as published:
        kind = getattr(published, name.upper().replace("-", "_"))
        method = kind(SimpleNamespace(eval=print), "cpu", "", arguments)
        method.run_method(support=f_s, query=f, y_s=y[None], y_q=torch.zeros(1, len(x)).long())
        answer = method.u[0]
    same(ours(name, few_shot, max_iter=5), answer.argmax(1))


@needs(ECALP)
@pytest.mark.parametrize("shots", [False, True])
def test_ecalp(few_shot, shots):
    x, t, s, y = few_shot
    rows, labels = (s, one_hot(y, len(t)).float()) if shots else (None, None)
    with imported(ECALP, "utils.iterative_label_propagation") as published:
        published.Y_0 = published.Y_txt = None
        published.iterative_label_propagation(
            x,
            t,
            k_text=3,
            k_image=8,
            k_fewshot=8,
            gamma=10.0,
            alpha=1.0,
            fewshot_image_features=rows,
            fewshot_labels=labels,
        )
        answer = published.Y_0  # the largest entry of each row alone
    same(ours("ecalp", few_shot, anchors="both" if shots else "texts"), answer.argmax(1))


class CupyArray(np.ndarray):
    """An array that a GPU would have."""

    def get(self):
        return np.asarray(self)


def exactly(matrix, seeds, tol, maxiter):
    """In place of conjugate gradients."""
    return sparse.linalg.spsolve(matrix.tocsc(), seeds), 0


CUPY_STUBS = {  # numpy and scipy, which have the same names
    "cupy": {
        **{name: getattr(np, name) for name in ("array", "sqrt", "isnan", "isinf")},
        "zeros": lambda shape: np.zeros(shape).view(CupyArray),
    },
    "cupyx.scipy.sparse": {
        **{name: getattr(sparse, name) for name in ("csr_matrix", "diags", "eye")},
        "linalg": SimpleNamespace(cg=exactly),
    },
    "faiss": {},
}


def searched(rows, queries, k):
    """The k nearest rows of each query and their cosines, as FAISS returns them."""
    found = torch.topk(torch.from_numpy(queries @ rows.T), k)
    return found.indices.numpy(), found.values.numpy()


@needs(ZLAP)
@pytest.mark.parametrize("settings", [{}, {"gamma": 2.0, "alpha": 0.9}])
def test_zlap(few_shot, settings):
    x, t, *_ = few_shot
    with imported(ZLAP, "zlap", CUPY_STUBS) as published:
        given = {"k": 5, "gamma": 5.0, "alpha": 0.3, **settings}
        with mock.patch.object(published, "search_faiss", searched):
            answer = published.do_transductive_lp(x.numpy(), t.numpy(), **given)
    same(ours("zlap", few_shot, texts=True, **settings), answer.argmax(1))
