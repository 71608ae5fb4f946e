#!/usr/bin/env bash
# Builds llama.cpp, from the source package of llama-cpp-python on PyPI, into FOLDER (15 to 30 minutes on two cores),
# and prints the folder of its programs. If they are built already, it only prints the folder.
# usage: build_llama_cpp.sh [FOLDER]      needs python3 with venv, a C++ compiler
#   LLAMA_CPP_PYTHON=VERSION   another version of the package
#   PROGRAMS="llama-bench ..." what to build
#   JOBS=N                     compilers at a time
set -euo pipefail

readonly version=${LLAMA_CPP_PYTHON:-0.3.36}
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/burn-ternary/llama_cpp-$version}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
readonly folder
read -ra targets <<<"${PROGRAMS:-llama-bench llama-batched-bench llama-quantize}"

if [[ ! -d $folder/llama.cpp ]]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet cmake ninja >&2
    # `pip download` would run the package's build to learn its name; asking the index for the file does not.
    "$folder/venv/bin/python" - "$version" "$folder" <<'PYTHON'
import hashlib, html, os, re, subprocess, sys, tarfile, urllib.parse, urllib.request

version, folder = sys.argv[1:]
ask = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True)
index = os.environ.get("PIP_INDEX_URL") or ask.stdout.strip() or "https://pypi.org/simple"
index = index.rstrip("/") + "/llama-cpp-python/"
name = f"llama_cpp_python-{version}.tar.gz"
links = re.findall(r'href="([^"]+)"', urllib.request.urlopen(index).read().decode())
link = next((html.unescape(l) for l in links if f"/{name}#sha256=" in l), None)
if link is None:
    sys.exit(f"{index}: expected {name}, found {len(links)} other files")
url, digest = urllib.parse.urljoin(index, link).split("#sha256=")
data = urllib.request.urlopen(url).read()
if hashlib.sha256(data).hexdigest() != digest:
    sys.exit(f"{name}: expected SHA-256 {digest}, found another")
path = os.path.join(folder, name)
with open(path, "wb") as file:
    file.write(data)
inside = f"llama_cpp_python-{version}/vendor/llama.cpp/"
with tarfile.open(path) as archive:
    # Without .git, which points to a repository that is not there and makes ninja configure forever.
    members = [m for m in archive if m.name.startswith(inside) and not m.name.startswith(inside + ".git/")
               and m.name != inside + ".git"]
    for member in members:
        member.name = "llama.cpp.part/" + member.name[len(inside):]
        archive.extract(member, folder, filter="data")
os.rename(os.path.join(folder, "llama.cpp.part"), os.path.join(folder, "llama.cpp"))
os.remove(path)
PYTHON
fi

# GCC 12 assumes that `_tile_loadconfig` reads 8 of its 64 bytes, and removes the code that fills the others: the program
# ends with SIGSEGV at the first AMX product.
mmq=$folder/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp
if [[ -f $mmq ]] && ! grep -q '"r"(&tc)' "$mmq"; then
    sed -i 's/^    _tile_loadconfig(&tc);/    asm volatile("" :: "r"(\&tc) : "memory");\n&/' "$mmq"
fi

export PATH=$folder/venv/bin:$PATH
if [[ ! -f $folder/build/build.ninja ]]; then
    cmake -G Ninja -S "$folder/llama.cpp" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF >&2
fi
ninja -C "$folder/build" -j "${JOBS:-$(nproc)}" "${targets[@]}" >&2
echo "$folder/build/bin"
