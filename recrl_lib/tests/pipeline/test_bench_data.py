from recrl_lib.data import load
from recrl_lib.pipeline import bench_data


def test_generated_files_are_read_without_a_bad_line(tmp_path):
    bench_data.generate(tmp_path, reviews=20_000, books=220)
    data = load("amazon-books", tmp_path)
    assert data.info["n_reviews"] == 20_000 and data.info["n_books"] == 220
    assert data.info["skipped_bad"] == [] and len(data.interactions) > 100


def test_the_benchmark_prints_speed_and_memory(capsys):
    bench_data.main(reviews=20_000, books=220)
    said = capsys.readouterr().out
    assert (
        "220 books and 20,000 reviews" in said
        and said.count("lines/s") == 2
        and "peak memory" in said
    )
