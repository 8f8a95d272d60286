// A driver without a GPU: NVIDIA's library or AMD's, by -DCUDA or -DHIP. It loads the images that ship, runs the
// device code as host.cpp does, and is as unkind as a driver may be:
//
//   streams are lazy      nothing runs before it is waited for, so an order that nobody asked for is not there
//   host memory moves     pinned memory has another address on the device, and neighbours do not lie side by side
//   kernels differ        those of Triton take the arguments one by one, in blocks of as many threads as fake_set says
//   calls fail            pinning above a sum, the k-th launch, an event that never comes, as fake_set says
//
// Handles that were never made, or are gone, are refused; so is a kernel that reads or writes a chunk where no
// memory of the device or pinned memory by its device address is. fake_count tells what was done and what is left.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

static void* fake_reached(const volatile void* p, size_t size);
#define HOST_CHUNK(p) ((decltype(p))fake_reached(p, sizeof(*(p))))
#include "host.cpp"

namespace {

enum Status {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_IMAGE = 200,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    ALREADY_REGISTERED = 712,
    LAUNCH_FAILED = 719,
};

struct Stream {
    std::deque<std::function<int()>> ops;
    size_t done = 0;
};

struct Event {
    std::shared_ptr<Stream> stream;
    size_t at = 0;
    bool stuck = false;
    int patience = 0;
};

struct Range {
    uint64_t begin, end, device;
};

std::recursive_mutex lock;
std::map<std::string, int64_t> settings, counts;
std::map<uint64_t, std::shared_ptr<Stream>> streams;
std::map<uint64_t, std::shared_ptr<Event>> events;
std::map<uint64_t, std::string> functions;
std::map<uint64_t, size_t> device_memory, host_memory;
std::set<uint64_t> modules;
std::map<uint64_t, Range> pins;
uint64_t next_handle = 0x1000;
int broken = OK;  // sticky, as a context is after an illegal access
bool device_used = false;

bool inside(const std::map<uint64_t, size_t>& memory, uint64_t begin, size_t size) {
    auto at = memory.upper_bound(begin);
    if (at == memory.begin()) return false;
    --at;
    return begin + size <= at->first + at->second;
}

bool pinned_here(uint64_t begin, size_t size) {
    for (const auto& [at, range] : pins)
        if (begin >= at && begin + size <= range.end) return true;
    return false;
}

std::shared_ptr<Stream> stream_of(void* handle) {
    const auto found = streams.find((uint64_t)handle);
    if (found == streams.end()) return nullptr;
    return found->second;
}

int run(const std::shared_ptr<Stream>& stream, size_t to) {
    while (stream->done < to) {
        const size_t at = stream->done;
        const int status = stream->ops[at]();
        if (status) broken = status;
        if (broken) return broken;
        stream->done = at + 1;
    }
    return OK;
}

int put(void* handle, std::function<int()> op) {
    if (broken) return broken;
    const auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    stream->ops.push_back(std::move(op));
    return OK;
}

int made(void** to, uint64_t value) {
    *to = (void*)value;
    return OK;
}

template <class Memory>
int allocate(void** to, size_t size, Memory& memory) {
    void* const p = aligned_alloc(256, (size + 255) / 256 * 256);
    memset(p, 0xDD, size);
    memory[(uint64_t)p] = size;
    return made(to, (uint64_t)p);
}

template <class Memory>
int release(void* p, Memory& memory) {
    if (!memory.erase((uint64_t)p)) return INVALID_VALUE;
    free(p);
    return OK;
}

// --- what both vendors have

int fake_load(void** module, const void* image) {
    const unsigned char* const bytes = (const unsigned char*)image;
#if defined(CUDA)
    const bool fits = !memcmp(bytes, "\x7f" "ELF", 4) ? *(const uint16_t*)(bytes + 18) == 190
                                                      : strstr((const char*)image, ".target sm_") != nullptr;
#else
    const bool fits = !memcmp(bytes, "\x7f" "ELF", 4) && *(const uint16_t*)(bytes + 18) == 224;
#endif
    if (!fits) return INVALID_IMAGE;
    modules.insert(++next_handle);
    return made(module, next_handle);
}

int fake_function(void** function, void* module, const char* name) {
    if (!modules.count((uint64_t)module)) return INVALID_HANDLE;
    if (strcmp(name, "lmc_gather") && strcmp(name, "lmc_scatter")) return NOT_FOUND;
    functions[++next_handle] = name;
    return made(function, next_handle);
}

// Of kernels that take each field as a parameter, and then two pointers to scratch memory: they need none.
lmc_pages joined(void** arguments) {
    lmc_pages args{};
    char* to = (char*)&args;
    for (int field = 0; field < 13; ++field) {
        const size_t size = field < 5 ? 8 : 4;
        memcpy(to, arguments[field], size);
        to += size;
    }
    if (*(void**)arguments[13] || *(void**)arguments[14]) args.grid = 0;  // which no launch has
    return args;
}

int fake_launch(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                unsigned shared, void* stream, void** arguments, void** extra) {
    const auto found = functions.find((uint64_t)function);
    if (found == functions.end()) return INVALID_HANDLE;
    const unsigned split = (unsigned)settings["split"], threads = split ? split : LMC_BLOCK;
    if (gy != 1 || gz != 1 || bx != threads || by != 1 || bz != 1 || shared || extra) return INVALID_VALUE;
    if (++counts["launches"] == settings["fail_launch"]) return LAUNCH_FAILED;
    const lmc_pages args = split ? joined(arguments) : *(const lmc_pages*)arguments[0];  // copied at the call
    if (args.grid != gx || args.grid % (LMC_BLOCK / threads)) return INVALID_VALUE;
    const bool gather = found->second == "lmc_gather";
    for (const auto& table : {(uint64_t)args.planes, (uint64_t)args.before, (uint64_t)args.pieces,
                              (uint64_t)args.starts, (uint64_t)args.page_ids})
        if (!inside(device_memory, table, 8)) return INVALID_VALUE;
    return put(stream, [args, gather] {
        host_launch(gather, &args, (unsigned)++counts["runs"]);
        return broken;
    });
}

int fake_copy(void* to, const void* from, size_t size, void* stream, bool down) {
    if (!inside(device_memory, (uint64_t)(down ? from : to), size)) return INVALID_VALUE;
    if (++counts["copies"] == settings["fail_copy"]) return OUT_OF_MEMORY;
    ++counts[down ? "to_host" : "to_device"];
    return put(stream, [=] {
        memcpy(to, from, size);
        return (int)OK;
    });
}

// Host memory must be pinned, and named by its address here; the order is anybody's.
int fake_batch(const uint64_t* to, const uint64_t* from, const uint64_t* sizes, size_t count, const int* attributes,
               const size_t* first, size_t num_attributes, void* stream) {
    const bool fits = count && stream && num_attributes == 1 && *first == 0 && attributes[0] == 1 && attributes[5] == 0;
    if (!fits || count > 8192) return INVALID_VALUE;
    for (size_t i = 0; i < count; ++i)
        for (const uint64_t p : {to[i], from[i]})
            if (!inside(device_memory, p, sizes[i]) && !pinned_here(p, sizes[i])) return INVALID_VALUE;
    if (++counts["batches"] == settings["fail_batch"]) return OUT_OF_MEMORY;
    counts["pieces"] += (int64_t)count;
    for (size_t i = count; i--;)
        if (const int status = put(stream, [to = (void*)to[i], from = (void*)from[i], size = sizes[i]] {
                memcpy(to, from, size);
                return (int)OK;
            }))
            return status;
    return OK;
}

int fake_pci_address(char* text, int size, int device) {
    return snprintf(text, (size_t)size, "0000:3B:%02X.0", device) < size ? OK : INVALID_VALUE;
}

int fake_stream(void** stream, unsigned flags) {
    if (flags != 1) return INVALID_VALUE;
    streams[++next_handle] = std::make_shared<Stream>();
    return made(stream, next_handle);
}

int fake_stream_wait(void* stream, void* event) {
    const auto found = events.find((uint64_t)event);
    if (found == events.end()) return INVALID_HANDLE;
    const Event seen = *found->second;
    return put(stream, [seen] { return seen.stream ? run(seen.stream, seen.at) : (int)OK; });
}

int fake_event(void** event, unsigned flags) {
    if (flags != 2) return INVALID_VALUE;
    events[++next_handle] = std::make_shared<Event>();
    return made(event, next_handle);
}

int fake_record(void* event, void* stream) {
    const auto found = events.find((uint64_t)event);
    const auto into = stream_of(stream);
    if (found == events.end() || !into) return INVALID_HANDLE;
    if (broken) return broken;
    *found->second = Event{into, into->ops.size(), settings["stuck"] != 0, (int)settings["patience"]};
    return OK;
}

int fake_query(void* event) {
    const auto found = events.find((uint64_t)event);
    if (found == events.end()) return INVALID_HANDLE;
    Event& one = *found->second;
    if (broken) return broken;
    const bool stuck = one.stuck && !settings["unstick"];
    if (!one.stream || one.stream->done >= one.at) return stuck ? NOT_READY : OK;
    if (stuck || one.patience-- > 0) return NOT_READY;
    return run(one.stream, one.at);
}

int fake_wait(void* event) {
    const auto found = events.find((uint64_t)event);
    if (found == events.end()) return INVALID_HANDLE;
    if (broken) return broken;
    return found->second->stream ? run(found->second->stream, found->second->at) : (int)OK;
}

int fake_pin(void* host, size_t size, unsigned flags) {
    if (flags != 3 || !size) return INVALID_VALUE;
    const uint64_t begin = (uint64_t)host;
    for (const auto& [at, range] : pins)
        if (begin < range.end && range.begin < begin + size) return ALREADY_REGISTERED;
    const int64_t most = settings["pin_limit"];
    if (most && counts["pinned"] + (int64_t)size > most) return OUT_OF_MEMORY;
    counts["pinned"] += (int64_t)size;
    // far from the host's address, and with a gap between neighbours
    pins[begin] = Range{begin, begin + size, (uint64_t)(0x40 + ++counts["pins"] * 3) << 48 | (begin & 0xFFFFF)};
    return OK;
}

int fake_unpin(void* host) {
    const auto found = pins.find((uint64_t)host);
    if (found == pins.end()) return INVALID_VALUE;
    counts["pinned"] -= (int64_t)(found->second.end - found->second.begin);
    pins.erase(found);
    return OK;
}

int fake_device_address(void** device, void* host) {
    const auto found = pins.find((uint64_t)host);
    if (settings["no_address"]) return INVALID_VALUE;
    return found == pins.end() ? (int)INVALID_VALUE : made(device, found->second.device);
}

}  // namespace

static void* fake_reached(const volatile void* p, size_t size) {
    const uint64_t begin = (uint64_t)p;
    if (inside(device_memory, begin, size)) return (void*)p;
    for (const auto& [at, range] : pins)
        if (begin >= range.device && begin + size <= range.device + (range.end - range.begin))
            return (void*)(range.begin + (begin - range.device));
    broken = ILLEGAL_ADDRESS;
    static char nowhere[64];
    return nowhere;
}

#define CALL(name, ...) \
    extern "C" int name(__VA_ARGS__) { \
        const std::lock_guard<std::recursive_mutex> guard(lock); \
        ++counts[#name];
#define IN_USE \
    if (!device_used) return 201;  // no context
#define END }

extern "C" void fake_set(const char* name, int64_t value) { settings[name] = value; }
extern "C" int64_t fake_count(const char* name) { return counts[name]; }
extern "C" int64_t fake_left() {
    return (int64_t)(streams.size() + events.size() + device_memory.size() + host_memory.size() + pins.size());
}
// Memory that others allocated on the device.
extern "C" void fake_own(void* p, size_t size) { device_memory[(uint64_t)p] = size; }
extern "C" void fake_disown(void* p) { device_memory.erase((uint64_t)p); }
extern "C" void fake_reset() {
    settings.clear(), counts.clear(), streams.clear(), events.clear(), pins.clear(), modules.clear();
    functions.clear(), device_memory.clear(), host_memory.clear();
    broken = OK, device_used = false;
    settings["patience"] = 1;
}

#if defined(CUDA)
#    define VENDOR(cuda, hip) cuda
#else
#    define VENDOR(cuda, hip) hip
#endif

CALL(VENDOR(cuInit, hipInit), unsigned flags) return flags ? INVALID_VALUE : OK; END
CALL(VENDOR(cuModuleLoadData, hipModuleLoadData), void** m, const void* image) IN_USE return fake_load(m, image); END
CALL(VENDOR(cuModuleGetFunction, hipModuleGetFunction), void** f, void* m, const char* name)
    return fake_function(f, m, name); END
CALL(VENDOR(cuLaunchKernel, hipModuleLaunchKernel), void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
     unsigned by, unsigned bz, unsigned shared, void* stream, void** arguments, void** extra)
    IN_USE return fake_launch(f, gx, gy, gz, bx, by, bz, shared, stream, arguments, extra); END
CALL(VENDOR(cuStreamCreate, hipStreamCreateWithFlags), void** s, unsigned flags) IN_USE return fake_stream(s, flags); END
CALL(VENDOR(cuStreamWaitEvent, hipStreamWaitEvent), void* s, void* e, unsigned flags)
    return flags ? (int)INVALID_VALUE : fake_stream_wait(s, e); END
CALL(VENDOR(cuStreamDestroy_v2, hipStreamDestroy), void* s) return streams.erase((uint64_t)s) ? OK : INVALID_HANDLE; END
CALL(VENDOR(cuEventCreate, hipEventCreateWithFlags), void** e, unsigned flags) IN_USE return fake_event(e, flags); END
CALL(VENDOR(cuEventRecord, hipEventRecord), void* e, void* s) return fake_record(e, s); END
CALL(VENDOR(cuEventQuery, hipEventQuery), void* e) return fake_query(e); END
CALL(VENDOR(cuEventSynchronize, hipEventSynchronize), void* e) return fake_wait(e); END
CALL(VENDOR(cuEventDestroy_v2, hipEventDestroy), void* e) return events.erase((uint64_t)e) ? OK : INVALID_HANDLE; END
CALL(VENDOR(cuMemAlloc_v2, hipMalloc), void** p, size_t size) IN_USE return allocate(p, size, device_memory); END
CALL(VENDOR(cuMemFree_v2, hipFree), void* p) return release(p, device_memory); END
CALL(VENDOR(cuMemHostAlloc, hipHostMalloc), void** p, size_t size, unsigned flags)
    IN_USE return flags == 3 ? allocate(p, size, host_memory) : (int)INVALID_VALUE; END
CALL(VENDOR(cuMemFreeHost, hipHostFree), void* p) return release(p, host_memory); END
CALL(VENDOR(cuMemcpyHtoDAsync_v2, hipMemcpyHtoDAsync), void* d, const void* h, size_t size, void* s)
    return fake_copy(d, h, size, s, false); END
CALL(VENDOR(cuMemcpyDtoHAsync_v2, hipMemcpyDtoHAsync), void* h, const void* d, size_t size, void* s)
    return fake_copy(h, d, size, s, true); END
CALL(VENDOR(cuMemHostRegister_v2, hipHostRegister), void* h, size_t size, unsigned flags)
    IN_USE return fake_pin(h, size, flags); END
CALL(VENDOR(cuMemHostUnregister, hipHostUnregister), void* h) return fake_unpin(h); END
CALL(VENDOR(cuMemHostGetDevicePointer_v2, hipHostGetDevicePointer), void** d, void* h, unsigned flags)
    return flags ? (int)INVALID_VALUE : fake_device_address(d, h); END

CALL(VENDOR(cuDeviceGetPCIBusId, hipDeviceGetPCIBusId), char* text, int size, int device)
    return fake_pci_address(text, size, device); END

#if defined(CUDA)
CALL(cuMemcpyBatchAsync_v2, const uint64_t* to, const uint64_t* from, const uint64_t* sizes, size_t count,
     const int* attributes, const size_t* first, size_t num, void* s) IN_USE
    return fake_batch(to, from, sizes, count, attributes, first, num, s); END
CALL(cuMemcpyBatchAsync, const uint64_t* to, const uint64_t* from, const uint64_t* sizes, size_t count,
     const int* attributes, const size_t* first, size_t num, size_t* failed, void* s) IN_USE
    return failed ? fake_batch(to, from, sizes, count, attributes, first, num, s) : (int)INVALID_VALUE; END
CALL(cuDevicePrimaryCtxRetain, void** context, int device) return made(context, 0xC0 + device); END
CALL(cuCtxSetCurrent, void* context) device_used = context != nullptr; return OK; END
CALL(cuGetErrorName, int status, const char** text) *text = status == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR"; return OK; END
CALL(cuGetErrorString, int, const char** text) *text = "a fake one"; return OK; END
#else
CALL(hipSetDevice, int) device_used = true; return OK; END
extern "C" const char* hipGetErrorName(int status) { return status == 719 ? "hipErrorLaunchFailure" : "hipError"; }
extern "C" const char* hipGetErrorString(int) { return "a fake one"; }
#endif
