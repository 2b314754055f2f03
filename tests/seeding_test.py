from montessori_jax.seeding import derive_seed


def test_seeds_differ_by_purpose_and_are_the_same_again():
    purposes = [(0, "a"), (0, "b"), (1, "a"), (0, "a", 1), (0, "a", 2), (0, "a/1", "x")]
    seeds = [derive_seed(*purpose) for purpose in purposes]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [derive_seed(*purpose) for purpose in purposes]
    assert all(0 <= seed < 2**31 for seed in seeds)
