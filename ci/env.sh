# Sourced. `use_env dev`, `use_env sglang` or `use_env vllm` makes, renews or reuses a virtual environment in .venvs/ and
# sets $PY to its Python. A stamp holds what an environment was made from: while that is unchanged, use_env costs a moment.
# The machine needs Debian's or PyPI's usual tools only; what is missing is installed (root on Debian) or named.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '== %s\n' "$*"; }

die() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

use_env() {
    local name=$1 venv=$ROOT/.venvs/$1
    PY=$venv/bin/python
    mkdir -p "$ROOT/.venvs"
    printf '*\n' > "$ROOT/.venvs/.gitignore"
    exec 9> "$venv.lock"
    flock 9 # a second run waits for the first one's installation
    need_tools "$name"
    if ! "$PY" -c '' 2> /dev/null || ! fresh "$venv/packages.stamp" "$(packages_stamp "$name")"; then
        make_env "$name"
    fi
    if ! fresh "$venv/project.stamp" "$(project_stamp)" || ! built; then
        install_project "$name"
    fi
    if [[ $name == sglang && ! -e $venv/page-hash.stamp ]]; then
        build_page_hash "$name"
    fi
    exec 9>&-
}

built() { compgen -G "$ROOT/lmc/cpu/*.so" > /dev/null && [[ -f $ROOT/lmc/kernels/objects/manifest.json ]]; }

fresh() { [[ -f $1 && $(< "$1") == "$2" ]]; }

packages_stamp() {
    printf '%s %s %s' "$(cat "$ROOT"/ci/requirements/{torch,"$1"}.txt | sha256sum | cut -c1-64)" "$($PYTHON -V)" "$ROOT"
}

project_stamp() {
    (
        cd "$ROOT"
        cat pyproject.toml setup.py ci/native.py tests/engines/*/pyproject.toml
        find lmc -name '*.[ch]' -o -name '*.cu' -o -name '*.hip' | sort | xargs cat
        ls integrations
    ) | sha256sum | cut -c1-64
}

make_env() {
    local name=$1 venv=$ROOT/.venvs/$1
    need_disk "$ROOT/.venvs" 5
    say "environment $name: installing ci/requirements/$name.txt (once, some minutes; log: $venv.log)"
    rm -rf "$venv"
    "$PYTHON" -m venv "$venv" > "$venv.log" 2>&1 || explain "$venv.log"
    install "$name" -r "$ROOT/ci/requirements/torch.txt"
    install "$name" --no-deps -r "$ROOT/ci/requirements/$name.txt"
    packages_stamp "$name" > "$venv/packages.stamp"
}

install_project() {
    local name=$1
    say "environment $name: installing this repository"
    install "$name" --no-build-isolation --no-deps -e "$ROOT"
    case $name in # what lets the engine run on a CPU
        sglang) install "$name" --no-build-isolation --no-deps -e "$ROOT/tests/engines/cpu_platform" ;;
        vllm) install "$name" --no-build-isolation --no-deps -e "$ROOT/tests/engines/vllm_name" ;;
    esac
    project_stamp > "$ROOT/.venvs/$name/project.stamp"
}

install() {
    local log=$ROOT/.venvs/$1.log
    "$PY" -m pip install --quiet "${@:2}" >> "$log" 2>&1 || explain "$log"
}

# SGLang compiles its page hash at first use and keeps it in ~/.cache/torch_extensions; done here, no server pays for it.
build_page_hash() {
    local log=$ROOT/.venvs/$1.log
    say "environment $1: compiling SGLang's page hash (once)"
    "$PY" - >> "$log" 2>&1 <<- 'EOF' || die "SGLang's page hash did not compile; the compiler's words are at the end of $log"
		from array import array
		from sglang.srt.mem_cache.radix_cache import RadixKey
		from sglang.srt.mem_cache.utils import get_storage_hash_str
		assert len(get_storage_hash_str(RadixKey(array("q", range(64))), None, page_size=64)) == 1
	EOF
    touch "$ROOT/.venvs/$1/page-hash.stamp"
}

need_tools() {
    local missing=()
    if ! find_python; then
        missing+=(python3 python3-venv)
    elif ! "$PYTHON" -c 'import ensurepip, venv' 2> /dev/null; then
        missing+=(python3-venv)
    fi
    if [[ $1 == dev || $1 == sglang ]]; then # sanitizers; SGLang's page hash
        command -v g++ > /dev/null || missing+=(g++)
    fi
    if [[ $1 == sglang ]]; then
        command -v ninja > /dev/null || missing+=(ninja-build)
        has_header openssl/sha.h || missing+=(libssl-dev)
        [[ -f $(python_include)/Python.h ]] || missing+=(python3-dev)
    fi
    if [[ $1 == vllm ]]; then
        has_library libnuma.so.1 || missing+=(libnuma1)
    fi
    if ((${#missing[@]})); then
        install_tools "${missing[@]}"
        find_python || die "no Python of at least 3.11 is here, even after installing python3" \
            "install one and name it: PYTHON=/path/to/python3.11 bash $0"
    fi
}

# Sets PYTHON; a value from the caller's environment is taken or refused, never replaced.
find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        new_enough "$PYTHON" || die "PYTHON=$PYTHON is not a Python of at least 3.11"
        return 0
    fi
    for candidate in python3.11 python3.12 python3.13 python3; do
        if new_enough "$candidate"; then
            PYTHON=$(command -v "$candidate")
            return 0
        fi
    done
    return 1
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; }

python_include() { "${PYTHON:-python3}" -c 'import sysconfig; print(sysconfig.get_path("include"))' 2> /dev/null; }

has_header() { printf '#include "%s"\n' "$1" | g++ -E -x c++ - > /dev/null 2>&1; }

has_library() { "${PYTHON:-python3}" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$1" 2> /dev/null; }

install_tools() {
    local command="apt-get install -y --no-install-recommends $*" log=$ROOT/.venvs/apt.log
    if ((EUID != 0)) || ! command -v apt-get > /dev/null; then
        die "this machine lacks: $*" "install them (Debian and Ubuntu: sudo $command) and run this again"
    fi
    say "installing Debian packages: $*"
    { apt-get update && DEBIAN_FRONTEND=noninteractive $command; } > "$log" 2>&1 < /dev/null \
        || die "apt-get could not install: $*" "its words are at the end of $log; install them by hand and run this again"
}

need_disk() {
    local free_gb
    free_gb=$(($(df -Pk "$1" | awk 'NR == 2 {print $4}') >> 20))
    ((free_gb >= $2)) || die "$1 has $free_gb GB of free disk, $2 are needed" "free some and run this again"
}

# pip's failures in a sentence.
explain() {
    local log=$1
    if grep -q 'No space left on device' "$log"; then
        die "the disk is full" "free some space (pip cache purge helps) and run this again; log: $log"
    elif grep -qiE 'name resolution|failed to establish|connection (refused|reset)|timed out|No matching distribution' "$log"; then
        tail -n 5 "$log" >&2
        die "packages could not be downloaded; log: $log" \
            "this needs a Python package index: check the network, or point PIP_INDEX_URL at a mirror, and run this again"
    fi
    tail -n 20 "$log" >&2
    die "the installation failed, see above; log: $log"
}
