"""Which pages the plans' benchmark can make, and which programs the scaling one compiles."""

from benchmarks import plans, scaling
from benchmarks.plans_known import Known
from montessori_jax.errors import UserError
from montessori_jax.plan.analysis import Found
from montessori_jax.plan.hlo import Collective
from tests.plan.libtpu import needs_libtpu


class Asked:
    """What was planned, in place of minutes of compiling."""

    def __init__(self, monkeypatch, folder, *arguments):
        self.made = []
        monkeypatch.setattr(plans, "plan_of", self.plan_of)
        monkeypatch.setattr(plans, "PAGES", folder / "pages")
        monkeypatch.setattr(plans, "BUILD", folder / "build")
        monkeypatch.setattr("sys.argv", ["plans", *arguments])
        plans.main()
        self.index = (folder / "pages" / "index.md").read_text()
        self.pages = {path.stem for path in (folder / "pages").glob("*.md")} - {"index"}

    def plan_of(self, config, target, known, search):
        self.made.append((config, target))
        raise UserError(f"{target} has no room")


def test_every_config_of_the_paper_has_a_line_and_the_students_a_page(monkeypatch, tmp_path):
    asked = Asked(monkeypatch, tmp_path)
    assert len(plans.STUDENTS) == 5 < len(plans.NAMED)
    assert sorted(asked.made) == sorted((n, t) for n in plans.NAMED for t in plans.TARGETS)
    assert asked.pages == {plans.file_name(n, t) for n in plans.STUDENTS for t in plans.TARGETS}
    for name in plans.NAMED:
        [line] = [line for line in asked.index.splitlines() if line.startswith(f"| {name} |")]
        assert line.count("has no room") == len(plans.TARGETS)
        assert line.count(".md)") == (len(plans.TARGETS) if name in plans.STUDENTS else 0)


def test_by_name_a_row_has_a_page_too_and_other_lines_stay(monkeypatch, tmp_path):
    Asked(monkeypatch, tmp_path, "--config", "tinyllama_1b", "--target", "v5e:4x4")
    row = "main/llama3_8b/self_reward_1"
    file = "main-llama3_8b-self_reward_1-v5p-2x2x1"
    asked = Asked(monkeypatch, tmp_path, "--config", row, "--target", "v5p:2x2x1", "--pages")
    assert asked.made == [(row, "v5p:2x2x1")]
    assert file in asked.pages
    assert f"[error: v5p:2x2x1 has no room]({file}.md)" in asked.index
    assert "[error: v5e:4x4 has no room](tinyllama_1b-v5e-4x4.md)" in asked.index


def test_what_was_found_is_read_back_but_for_half_a_line(tmp_path):
    talk = Collective("all-reduce", ("data", "fsdp"), "f32", 3, 4.5, between_slices=True)
    path = tmp_path / "build" / "1.jsonl"
    known = Known(path)
    known["a"] = Found((1, 2, 3, 4), 0, 5.0, (talk,), 6, 7.0)
    known["b"] = Found(None, 8)
    with path.open("a") as file:
        file.write('\n{"key": "c", "siz')
    again = Known(path)
    assert again == {"a": Found((1, 2, 3, 4), 0, 5.0, (talk,), 6, 7.0), "b": Found(None, 8)}
    again["d"] = Found((0, 0, 0, 0), 0)
    assert list(Known(path)) == ["a", "b", "d"]


@needs_libtpu
def test_scaling_compiles_the_reference_gradient_too():
    found = [(one.stage, one.name) for one in scaling.programs(4)]
    assert found == [
        ("sft", "step"),
        ("influence", "exact: candidates"),
        ("influence", "linearized: candidates"),
        ("influence", "reference gradient"),
    ]
    assert len(found) * len(scaling.TOPOLOGIES) == 16
