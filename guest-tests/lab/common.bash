# shellcheck shell=bash
# Shared by lab, setup and kernels: the cache directory, messages, and fetching of Debian
# packages through a private apt root, so that this machine's apt state is never changed.

LAB_CACHE=${MAPGPA_LAB_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/mapgpa/lab}
LAB_ME=${0##*/}

say() { printf '%s: %s\n' "$LAB_ME" "$*" >&2; }
# die CODE TEXT: one clear line, then the end.
die() {
    local code=$1
    shift
    say "$*"
    exit "$code"
}

# shellcheck disable=SC2034 # used by those that read this file
# What the lab needs, as "command:Debian package".
LAB_NEEDS=(qemu-system-x86_64:qemu-system-x86 cpio:cpio gzip:gzip depmod:kmod
    dpkg-deb:dpkg apt-get:apt flock:util-linux zstd:zstd xz:xz-utils make:make)
# shellcheck disable=SC2034
# What building a guest kernel needs on top.
LAB_BUILD_NEEDS=(gcc:build-essential make:make bc:bc bison:bison flex:flex xz:xz-utils
    perl:perl /usr/include/libelf.h:libelf-dev /usr/include/openssl/opensslv.h:libssl-dev)

have() {
    if [[ $1 == /* ]]; then
        [[ -e $1 ]]
    else
        PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null 2>&1
    fi
}

# A busybox that runs without libraries: found by being static, as every distribution
# names its package and its file differently.
static_busybox() {
    local b
    for b in "${MAPGPA_LAB_BUSYBOX:-}" /bin/busybox /usr/bin/busybox /bin/busybox.static /usr/bin/busybox-static; do
        [[ -n $b && -x $b ]] || continue
        if ! head -c 8192 "$b" | LC_ALL=C grep -aq '/ld-linux\|/ld-musl'; then
            printf '%s\n' "$b"
            return 0
        fi
    done
    return 1
}

# missing_packages NEED...: Debian packages for the commands that are not there.
missing_packages() {
    local n
    for n in "$@"; do
        have "${n%%:*}" || printf '%s\n' "${n#*:}"
    done | sort -u
}

# install_packages PKG...: installs them as root, else prints the one command and ends.
install_packages() {
    (($# > 0)) || return 0
    have apt-get || die 2 "missing: $*; this machine has no apt-get: install them by its own means"
    if ((EUID != 0)); then
        die 2 "needs more packages; run: sudo apt-get install --no-install-recommends $*"
    fi
    say "installing $*"
    local log
    log=$(mktemp)
    if ! { DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" ||
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; }; } >"$log" 2>&1 </dev/null; then
        tail -n 5 "$log" >&2
        rm -f "$log"
        die 4 "apt-get install $* failed (see above)"
    fi
    rm -f "$log"
}

# cache_lock NAME: one at a time works on NAME in the cache, until this shell ends.
cache_lock() {
    local fd
    mkdir -p "$LAB_CACHE/locks" || die 4 "cannot write the cache directory $LAB_CACHE"
    exec {fd}>"$LAB_CACHE/locks/$1"
    if ! flock -n "$fd"; then
        say "another lab is working on $1: waiting for it"
        flock -w 1800 "$fd" || die 4 "gave up after 30 minutes: $1 is still locked by another lab"
    fi
}

# apt_entries: the machine's package sources, as "URI<TAB>SUITE<TAB>COMPONENTS<TAB>KEYRING".
apt_entries() {
    local f files=()
    for f in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [[ -r $f ]] && files+=("$f")
    done
    if ((${#files[@]})); then
        awk '
            /^[ \t]*deb[ \t]/ {
                sub(/#.*/, ""); key = ""; opts = ""
                if (match($0, /\[[^]]*\]/)) {
                    opts = substr($0, RSTART + 1, RLENGTH - 2)
                    $0 = substr($0, 1, RSTART - 1) substr($0, RSTART + RLENGTH)
                }
                n = split(opts, o, /[ \t]+/)
                for (i = 1; i <= n; i++) if (o[i] ~ /^signed-by=/) key = substr(o[i], 11)
                comps = ""
                for (i = 4; i <= NF; i++) comps = comps (comps == "" ? "" : " ") $i
                print $2 "\t" $3 "\t" comps "\t" key
            }' "${files[@]}"
    fi
    files=()
    for f in /etc/apt/sources.list.d/*.sources; do
        [[ -r $f ]] && files+=("$f")
    done
    if ((${#files[@]})); then
        awk '
            function flush(   i, j, n, m, u, s) {
                if (types ~ /(^|[ \t])deb([ \t]|$)/ && enabled != "no") {
                    n = split(uris, u, /[ \t]+/); m = split(suites, s, /[ \t]+/)
                    for (i = 1; i <= n; i++) for (j = 1; j <= m; j++)
                        if (u[i] != "" && s[j] != "") print u[i] "\t" s[j] "\t" comps "\t" key
                }
                types = uris = suites = comps = key = enabled = field = ""
            }
            FNR == 1 { flush() }
            /^#/ { next }
            /^[ \t]*$/ { flush(); next }
            /^[^ \t:]+:/ {
                field = tolower(substr($0, 1, index($0, ":") - 1))
                value = substr($0, index($0, ":") + 1)
                gsub(/^[ \t]+|[ \t]+$/, "", value)
            }
            /^[ \t]/ { value = $0; gsub(/^[ \t]+|[ \t]+$/, "", value) }
            {
                if (field == "types") types = types " " value
                if (field == "uris") uris = uris " " value
                if (field == "suites") suites = suites " " value
                if (field == "components") comps = comps (comps == "" ? "" : " ") value
                if (field == "enabled") enabled = tolower(value)
                # A key written out in the file itself has no path: left to the trusted parts.
                if (field == "signed-by" && value ~ /^\//) key = value
            }
            END { flush() }' "${files[@]}"
    fi
}

# own_codename: the release this machine runs, such as its os-release tells.
own_codename() {
    # shellcheck disable=SC1091
    (. /etc/os-release 2>/dev/null && printf '%s\n' "${VERSION_CODENAME:-${DEBIAN_CODENAME:-}}")
}

# apt_root SUITE: prepares a private apt root for SUITE ("own": this machine's release with its
# updates and security suites) and sets APT_ROOT. Fails if the mirror has no such suite.
apt_root() {
    local suite=$1 code entries uri s comps key signed kept='' mirror='' mkey='' sec='' seckey=''
    local conf tab=$'\t'
    have apt-get || { say "this machine has no apt-get: give the lab a kernel with --kernel IMAGE --modules DIR"; return 1; }
    code=$(own_codename)
    entries=$(apt_entries)
    while IFS=$tab read -r uri s comps key; do
        [[ " $comps " == *' main '* ]] || continue
        case $s in
            "$code" | "$code"-* | stable | oldstable | testing | unstable | sid | stable-* | oldstable-* | testing-*) ;;
            *) continue ;;
        esac
        signed=${key:+[signed-by=$key] }
        kept+="deb ${signed}$uri $s $comps"$'\n'
        case $s in
            *-security) sec=${sec:-$uri} seckey=${seckey:-$signed} ;;
            *) if [[ -z $mirror ]]; then mirror=$uri mkey=$signed; fi ;;
        esac
    done <<<"$entries"
    if [[ -n ${MAPGPA_LAB_MIRROR:-} ]]; then
        mirror=$MAPGPA_LAB_MIRROR
        mkey=${MAPGPA_LAB_KEYRING:+[signed-by=$MAPGPA_LAB_KEYRING] }
    fi
    if [[ $suite != own ]]; then
        if [[ -z ${MAPGPA_LAB_MIRROR:-} && $(. /etc/os-release 2>/dev/null && printf %s "${ID:-}") != debian ]]; then
            say "this machine's apt configuration has no Debian mirror: set MAPGPA_LAB_MIRROR (and MAPGPA_LAB_KEYRING)"
            return 1
        fi
        kept="deb ${mkey}$mirror $suite main"$'\n'
        if [[ -n $sec && $suite != *-* && $suite != sid ]]; then
            kept+="deb ${seckey}$sec $suite-security main"$'\n'
        fi
    fi
    if [[ -z $mirror ]]; then
        say "no package mirror found in this machine's apt configuration: set MAPGPA_LAB_MIRROR"
        return 1
    fi

    APT_ROOT=$LAB_CACHE/apt/$suite
    mkdir -p "$APT_ROOT"/{lists/partial,cache/archives/partial,state,etc} || die 4 "cannot write $APT_ROOT"
    : >"$APT_ROOT/status"
    # The machine's way to its mirror (proxies and the like), but none of its hooks.
    conf=$APT_ROOT/apt.conf
    {
        apt-config dump | grep '^Acquire::' | grep -v '^Acquire::IndexTargets' || true
        printf '%s "%s";\n' Dir::Etc::main /dev/null Dir::Etc::parts /dev/null \
            Dir::Etc::sourcelist "$APT_ROOT/sources.list" Dir::Etc::sourceparts /dev/null \
            Dir::Etc::preferences /dev/null Dir::Etc::preferencesparts /dev/null \
            Dir::State "$APT_ROOT/state" Dir::State::lists "$APT_ROOT/lists" \
            Dir::State::status "$APT_ROOT/status" Dir::Cache "$APT_ROOT/cache" \
            Acquire::Languages none APT::Architecture amd64 APT::Get::Assume-Yes true \
            Acquire::Retries 2 Acquire::http::Timeout 30 Acquire::https::Timeout 30
        ((EUID != 0)) || printf '%s "%s";\n' APT::Sandbox::User root
    } >"$conf"
    if [[ $(cat "$APT_ROOT/sources.list" 2>/dev/null) != "${kept%$'\n'}" ]]; then
        printf %s "$kept" >"$APT_ROOT/sources.list"
        rm -f "$APT_ROOT/updated"
    fi
    # Package lists are good for an hour.
    if [[ -z $(find "$APT_ROOT/updated" -mmin -60 2>/dev/null) ]]; then
        say "reading the package lists of ${suite/own/this machine\'s release}"
        if ! APT_CONFIG=$conf apt-get update -q -o APT::Update::Error-Mode=any >"$APT_ROOT/update.log" 2>&1 </dev/null; then
            # Older apts have no such mode; newer ones stop here when one of several suites is missing.
            if ! grep -q "^[EW]: " "$APT_ROOT/update.log" || ! apt_private apt-cache stats >/dev/null 2>&1 ||
                [[ -z $(find "$APT_ROOT/lists" -maxdepth 1 -name '*_Packages*' 2>/dev/null) ]]; then
                say "no package lists for $suite: $(grep -m1 '^[EW]: ' "$APT_ROOT/update.log" || echo 'apt-get update failed')"
                return 1
            fi
        fi
        touch "$APT_ROOT/updated"
    fi
}

apt_private() { APT_CONFIG=$APT_ROOT/apt.conf "$@" </dev/null; }

# newest_package REGEX: the newest package (by name) which matches the whole of REGEX.
newest_package() {
    local p
    p=$(apt_private apt-cache pkgnames | grep -Ex -- "$1") || return 1
    # Names without a version of their own are only mentioned by others.
    while read -r p; do
        if [[ -n $(apt_private apt-cache show --no-all-versions "$p" 2>/dev/null) ]]; then
            printf '%s\n' "$p"
            return 0
        fi
    done < <(sort -rV <<<"$p")
    return 1
}

package_field() { apt_private apt-cache show --no-all-versions "$1" 2>/dev/null | sed -n "s/^$2: //p" | head -n 1; }

# unpack_package PKG DIR: downloads PKG and unpacks it into DIR; nothing is installed.
unpack_package() {
    local pkg=$1 dir=$2 tmp
    tmp=$(mktemp -d "$LAB_CACHE/download.XXXXXX") || return 1
    say "downloading $pkg $(package_field "$pkg" Version)"
    if ! (cd "$tmp" && apt_private apt-get download -q "$pkg") >"$tmp/log" 2>&1; then
        say "cannot download $pkg: $(grep -m1 '^E: ' "$tmp/log" || tail -n 1 "$tmp/log")"
        rm -rf "$tmp"
        return 1
    fi
    mkdir -p "$dir" && dpkg-deb -x "$tmp"/*.deb "$dir"
    local rc=$?
    rm -rf "$tmp"
    return $rc
}

u32() { od -An -tu4 -j "$2" -N 4 "$1" | tr -d ' '; }
# unpack_kernel IMAGE VMLINUX: what is in a bzImage, unpacked here rather than by each run under emulation.
unpack_kernel() {
    local image=$1 sectors at size payload=$2.payload
    sectors=$(od -An -tu1 -j $((0x1f1)) -N 1 "$image" | tr -d ' ')
    at=$(((sectors + 1) * 512 + $(u32 "$image" $((0x248))))) size=$(u32 "$image" $((0x24c)))
    tail -c +$((at + 1)) "$image" | head -c "$size" >"$payload"
    case $(od -An -tx1 -N 4 "$payload" | tr -d ' ') in
        28b52ffd) zstd -dcq --memory=256MB "$payload" ;;
        1f8b*) gzip -dcq "$payload" ;;
        fd377a58) xz -dcq --single-stream "$payload" ;;
        *) return 1 ;;
    esac >"$2" 2>/dev/null || true # what follows the stream, its size, is complained about
    rm -f "$payload"
    [[ $(head -c 4 "$2" | tail -c 3) == ELF ]]
}
