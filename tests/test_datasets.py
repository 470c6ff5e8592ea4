"""MNIST, CIFAR and the like, in small files of their own formats, by torchvision's own readers."""

import pickle
import threading
from argparse import Namespace
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.pool import ThreadPool

import pytest
import torch
from conftest import SHORT, tiny
from helpers_datasets import (
    TEST,
    TRAINING,
    UNREACHABLE,
    make_cifar,
    make_idx,
    pack_cifar,
    pack_idx,
)
from helpers_images import make_folder, small_settings
from torchvision.datasets import CIFAR10, CIFAR100, KMNIST, MNIST, FashionMNIST
from torchvision.datasets.mnist import read_image_file

import sample
import train_distill
from workbench.choices import save_run_args
from workbench.data import load_data, usual_preset
from workbench.datasets import DATASETS, download_folder, read_dataset
from workbench.errors import InputError
from workbench.settings import preset

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker"]
FASHION += ["Bag", "Ankle boot"]
native = partial(tiny, image_size=28, patch=4)


def as_set(images):
    return {bytes(image.numpy().tobytes()) for image in images}


@pytest.fixture
def mnist(tmp_path):
    """The folder of a small MNIST, whose files are not packed."""
    make_idx(tmp_path / "sets")
    return tmp_path / "sets"


@pytest.fixture
def no_network(monkeypatch):
    for kind in (MNIST, FashionMNIST, KMNIST):
        monkeypatch.setattr(kind, "mirrors", [UNREACHABLE])
    for kind in (CIFAR10, CIFAR100):
        monkeypatch.setattr(kind, "url", UNREACHABLE + kind.filename)


class CountingHandler(SimpleHTTPRequestHandler):
    """It counts requests for each file."""

    counts = Counter()

    def log_message(self, *_):
        self.counts[self.path] += 1


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on this computer; its folder and its address."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(CountingHandler, "counts", Counter())
    folder = tmp_path / "served"
    handler = partial(CountingHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


# Reading ------------------------------------------------------------------------------------------


def test_the_parts_of_a_set_are_its_own_and_the_judge_sees_other_images_than_the_generator(mnist):
    """Its test images are the reference, and no training image is."""
    data = load_data(native(), "mnist", cache=mnist)
    assert data.classes == [str(y) for y in range(10)]
    raw = mnist / "MNIST" / "raw"
    for parts, name in (((data.train, data.judge), "train"), ((data.test,), "t10k")):
        own = read_image_file(raw / f"{name}-images-idx3-ubyte")[:, None].expand(-1, 3, -1, -1)
        found = torch.cat([part.images for part in parts])
        assert len(found) == len(own) and as_set(found) == as_set(own)
    assert len(as_set(data.train.images) | as_set(data.judge.images)) == 10 * TRAINING
    for part, n in ((data.train, 18), (data.judge, 6), (data.test, TEST)):
        assert part.labels.bincount().tolist() == [n] * 10


def test_an_image_keeps_its_class(mnist):
    everything = read_dataset("mnist", mnist)
    known = {x.numpy().tobytes(): int(y) for x, y in zip(everything.images, everything.labels)}
    data = load_data(native(seed=3), "mnist", cache=mnist)
    for part in (data.train, data.judge, data.test):
        assert [known[x.numpy().tobytes()] for x in part.images] == part.labels.tolist()


@pytest.mark.parametrize("name", ["mnist", "fashion", "kmnist"])
def test_packed_files_that_were_put_in_place_are_unpacked(name, tmp_path, monkeypatch, no_network):
    kind = DATASETS[name]
    folder = make_idx(tmp_path, kind)
    pack_idx(folder, kind, monkeypatch)
    data = load_data(native(), name, cache=tmp_path)
    assert len(data.test) == 10 * TEST
    classes = {"fashion": FASHION, "kmnist": "o ki su tsu na ha ma ya re wo".split()}
    assert data.classes == classes.get(name, [str(y) for y in range(10)])


@pytest.mark.parametrize("name, n", [("cifar10", 10), ("cifar100", 100)])
def test_cifar_has_its_colours_names_and_parts(name, n, tmp_path, monkeypatch):
    kind = DATASETS[name]
    folder = make_cifar(tmp_path, kind, monkeypatch)
    data = load_data(tiny(image_size=32, patch=4), name, cache=tmp_path)
    assert data.classes == [f"kind {y}" for y in range(n)]
    batch = pickle.loads((folder / kind.test_list[0][0]).read_bytes())
    red_green_blue = torch.as_tensor(batch["data"]).view(-1, 3, 32, 32)
    assert as_set(data.test.images) == as_set(red_green_blue)
    assert len(data.train) == n * 18 and len(data.judge) == n * 6


def test_a_cifar_archive_that_was_put_in_place_is_unpacked(tmp_path, monkeypatch, no_network):
    pack_cifar(make_cifar(tmp_path, CIFAR10, monkeypatch), CIFAR10, monkeypatch)
    assert len(load_data(tiny(image_size=32), "cifar10", cache=tmp_path).test) == 10 * TEST


def test_some_classes_are_divided_as_they_are_among_all(mnist):
    everything = load_data(native(), "mnist", cache=mnist)
    chosen = load_data(native(seed=1), "mnist", ["7", "3"], cache=mnist)
    assert chosen.classes == ["3", "7"] and list(chosen.digests) == ["3", "7"]
    for part in ("train", "judge", "test"):
        whole, some = getattr(everything, part), getattr(chosen, part)
        for label, y in enumerate([3, 7]):
            expected = whole.images[whole.labels == y]
            assert torch.equal(some.images[some.labels == label], expected)
    with pytest.raises(InputError, match="--classes: no class '10'; there are: 0, 1, 2"):
        load_data(native(), "mnist", ["10"], cache=mnist)


def test_a_class_needs_twenty_images(tmp_path, monkeypatch):
    make_cifar(tmp_path, CIFAR10, monkeypatch, per_class=19)
    with pytest.raises(InputError, match="class 'kind 0' in --data cifar10 has 19 readable"):
        load_data(tiny(image_size=32), "cifar10", cache=tmp_path)


def test_another_size_is_made_once_and_kept(mnist, capsys):
    data = load_data(small_settings(), "mnist", cache=mnist)
    assert data.train.size == 8 and data.cache.parent == mnist
    assert "images are made once and kept in" in capsys.readouterr().err
    again = load_data(small_settings(), "mnist", cache=mnist)
    assert capsys.readouterr().err == ""
    assert torch.equal(data.train.images, again.train.images)
    assert data.digests == again.digests
    large = load_data(native(), "mnist", cache=mnist).train
    mean = large.images.float().mean((1, 2, 3))
    # the mean of noise stays about the same, image by image
    assert (
        torch.corrcoef(torch.stack([mean, data.train.images.float().mean((1, 2, 3))]))[0, 1] > 0.5
    )


# Downloading --------------------------------------------------------------------------------------


def test_without_a_network_it_says_which_files_to_put_where(tmp_path, no_network):
    expected = (
        "--data fashion cannot be downloaded .*fetch train-images-idx3-ubyte.gz, "
        "train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz from "
        f"{UNREACHABLE} and put them into {tmp_path}/FashionMNIST/raw"
    )
    with pytest.raises(InputError, match=f"(?s){expected}"):
        load_data(native(), "fashion", cache=tmp_path)
    expected = f"fetch {UNREACHABLE}cifar-100-python.tar.gz and put it into {tmp_path}, as it is"
    with pytest.raises(InputError, match=expected):
        load_data(native(), "cifar100", cache=tmp_path)


def test_damaged_files_are_refused(mnist, tmp_path, monkeypatch, no_network):
    path = mnist / "MNIST" / "raw" / "train-images-idx3-ubyte"
    for damaged in (path.read_bytes()[:1000], b"", b"not a set"):
        path.write_bytes(damaged)
        with pytest.raises(
            InputError, match=f"--data mnist: a file in {mnist} is damaged .*: delete"
        ):
            load_data(native(), "mnist", cache=mnist)
    folder = make_cifar(tmp_path, CIFAR10, monkeypatch)
    (folder / "data_batch_3").write_bytes(b"not a batch")
    with pytest.raises(InputError, match="--data cifar10 cannot be downloaded"):
        load_data(native(), "cifar10", cache=tmp_path)


def test_a_set_is_downloaded_once_by_two_runs_at_the_same_time(server, tmp_path, monkeypatch):
    served, address = server
    folder = make_idx(served)
    pack_idx(folder, MNIST, monkeypatch)
    monkeypatch.setattr(MNIST, "mirrors", [f"{address}MNIST/raw/"])
    alone = load_data(native(), "mnist", cache=tmp_path / "alone")
    requests = dict(CountingHandler.counts)
    assert len(requests) == 4
    CountingHandler.counts.clear()
    load = partial(load_data, native(), "mnist", None, None)
    with ThreadPool(2) as pool:
        together = pool.map(load, [tmp_path / "shared"] * 2)
    assert CountingHandler.counts == requests
    for data in together:
        assert torch.equal(data.train.images, alone.train.images)
    load(tmp_path / "shared")
    assert CountingHandler.counts == requests


def test_cifar_is_downloaded_and_unpacked(server, tmp_path, monkeypatch):
    served, address = server
    pack_cifar(make_cifar(served, CIFAR10, monkeypatch), CIFAR10, monkeypatch)
    monkeypatch.setattr(CIFAR10, "url", address + CIFAR10.filename)
    data = load_data(tiny(image_size=32), "cifar10", cache=tmp_path / "new" / "folder")
    assert len(data.train) == 10 * 18


def test_downloads_of_all_runs_lie_where_torch_keeps_its_own(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert download_folder() == tmp_path / "datasets"
    with pytest.raises(InputError, match=f"put them into {tmp_path}/datasets/KMNIST/raw"):
        load_data(native(), "kmnist")


# Runs ---------------------------------------------------------------------------------------------


def test_a_set_has_a_preset_that_fits_it_and_a_folder_of_its_name_is_a_folder():
    for name in ("mnist", "fashion", "kmnist"):
        assert usual_preset(name, CPU) == usual_preset(name, GPU) == "mnist"
    for name in ("cifar10", "cifar100"):
        assert usual_preset(name, CPU) == "cifar"
        assert usual_preset(name, GPU) == "cifar_gpu"
    assert usual_preset("./mnist", CPU) == "folder"
    assert preset("mnist").image_size == 28 and not preset("mnist").flip
    for name in ("cifar", "cifar_gpu"):
        assert preset(name).image_size == 32 and preset(name).flip
    assert preset("cifar_gpu").length == preset("small").length


def test_a_folder_named_like_a_set_is_given_by_a_path(tmp_path, monkeypatch):
    make_folder(tmp_path / "mnist", ["cat", "dog"])
    monkeypatch.chdir(tmp_path)
    assert load_data(small_settings(), "./mnist").classes == ["cat", "dog"]


def test_a_resumed_run_must_have_the_same_images(mnist, tmp_path):
    args = Namespace(out=tmp_path / "out", resume=True, vae=None, features="own", teacher=None)
    vars(args).update(preset=None, quick=False)
    save_run_args(args, load_data(native(), "mnist", cache=mnist))
    (args.out / "teacher.pt").write_text("")
    save_run_args(args, load_data(native(), "mnist", cache=mnist))
    raw = mnist / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    raw.write_bytes(raw.read_bytes()[:-1] + bytes([raw.read_bytes()[-1] ^ 1]))
    with pytest.raises(InputError, match="other images than .* --data mnist: class 9 has other"):
        save_run_args(args, load_data(native(), "mnist", cache=mnist))


def test_a_run_on_a_set_can_be_resumed_and_sampled(tmp_path, monkeypatch, capsys):
    make_idx(tmp_path / "datasets", FashionMNIST)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    out = tmp_path / "out"
    shorter = "--steps 2 --judge-n 40 --judge-iters 2 --teacher-iters 2 --gsim-iters 1".split()
    argv = [*SHORT, *shorter, "--data", "fashion", "--out", str(out)]
    before = train_distill.main(argv)
    assert "180 to train on, 60 for the judge, 200 held out" in capsys.readouterr().out
    after = train_distill.main([*argv, "--resume"])
    assert after["rows"]["student"]["frechet"] == before["rows"]["student"]["frechet"]
    files = tmp_path / "files"
    argv = [str(out / "student.pt"), "--classes", "Ankle boot,T-shirt/top", "--n", "2"]
    sample.main([*argv, "--out", str(tmp_path / "two.png"), "--files", str(files)])
    assert sorted(path.name for path in files.iterdir()) == [
        "00000 Ankle boot.png",
        "00001 T-shirt_top.png",
    ]
    argv = [str(out / "student.pt"), "--data", "fashion", "--batches", "1", "--rounds", "2"]
    sample.main([*argv, "--bench", str(tmp_path / "bench.json")])
    assert (tmp_path / "bench.json").exists()
