def test_smoke(config, tmp_path):
    from peerlora.runtime.simulate import simulate

    for name in ("aedfl", "ad-psgd", "dec-lora"):
        r = simulate(
            config(
                "bert",
                f"algorithm.name={name}",
                "clock.speed=[1,1,0.5,0.1]",
                "clock.delay=0.3",
                "clock.bandwidth=10000",
            ),
            tmp_path / name,
        )
        from peerlora import read_events

        for e in read_events(r.run):
            print(str(e)[:1500])
    assert 0
