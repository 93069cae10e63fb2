import time
def test_a(cli, yaml_file, tmp_path):
    for i in range(3):
        t=time.time()
        a = cli("train", yaml_file(), "--out", tmp_path/f"run{i}", "--json")
        print(a, time.time()-t)
    import os
    print(os.listdir(tmp_path/"run0"))
    t=time.time()
    print(cli("show", tmp_path/"run0"), time.time()-t)
    print(cli("train", yaml_file("train.lr=1e30", "train.local_steps=1"), "train.dtype=fp32", "--out", tmp_path/"r", "--json"))
    print(cli("train", yaml_file("train.lr=1e30", ), "train.dtype=fp32", "--out", tmp_path/"r2", "--json"))
    assert 0
