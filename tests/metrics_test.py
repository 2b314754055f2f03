from montessori_jax.metrics import MetricsFile


def test_a_step_written_again_replaces_what_followed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    for step in (1, 2, 3, 4):
        first.write({"step": step, "loss": step / 2})
    resumed = MetricsFile(path)
    resumed.write({"step": 3, "loss": 9.0})
    assert resumed.read() == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 9.0},
    ]


def test_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).write({"step": 1})
    with open(path, "a") as file:
        file.write('{"step": 2, "lo')
    metrics = MetricsFile(path)
    metrics.write({"step": 2})
    assert metrics.read() == [{"step": 1}, {"step": 2}]
