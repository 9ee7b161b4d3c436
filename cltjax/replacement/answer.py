"""One question to a VLM, its replacement model, and either of them with interventions."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from capture import vlm as vlms
from capture.prompts import load_image, resolve_template
from capture.vlm import VLM
from cltjax.errors import UserError
from cltjax.replacement.clt import CLT
from cltjax.replacement.interventions import Intervention
from cltjax.replacement.model import ReplacementModel, Rewritten, SteeredModel


def generate(
    clt: Path,
    model: str,
    prompt: str,
    image: Path | None = None,
    change: Sequence[str] = (),
    n: int = 32,
    in_original: bool = False,
    within: tuple[int, int] | None = None,
    template: str = "chat",
    device: str = "auto",
    compute_dtype: str = "auto",
    lazy: bool = False,
    clt_dtype: str = "float32",
    other_revision: bool = False,
) -> dict[str, str]:
    """The greedy answers by who gave them; printed as they come. The arguments are the options of `cltjax generate`."""
    interventions = [Intervention.parse(text) for text in change]
    if n < 1:
        raise UserError(f"--n {n}: must be at least 1")
    if (in_original or within) and not interventions:
        raise UserError("--in-original and --within are about interventions: name some with --set")
    picture = None if image is None else open_image(image)
    vlm = vlms.load(model, compute_dtype, device)
    loaded = CLT.from_pretrained(clt, vlm.device, vlms.DTYPES[clt_dtype], lazy)
    text = resolve_template(template, vlm.processor).render(prompt, image=picture is not None)
    encoded = vlm.encode(text, picture)
    asked: dict[str, VLM | Rewritten] = {
        "original": vlm,
        "replaced": ReplacementModel(vlm, loaded, other_revision=other_revision),
    }
    if interventions:
        changed = SteeredModel if in_original else ReplacementModel
        whose = "original" if in_original else "replaced"
        asked[f"{whose}, {' '.join(change)}"] = changed(vlm, loaded, interventions, within, other_revision)
    answers = {}
    for who, one in asked.items():
        answers[who] = vlm.decode(one.generate([encoded], n)[0])
        print(f"{who}: {answers[who]}", flush=True)
    return answers


def open_image(path: Path) -> Image.Image:
    """UserError for a file that is missing or no image."""
    try:
        return load_image(path)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--image {path}: cannot be read ({error}): name an image file") from error
