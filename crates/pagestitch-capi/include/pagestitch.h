/* Scattered memory, one contiguous region, filled on first touch.
 *
 * A call returns 0, or a negative ps_status. Then ps_last_error() has a line of text for people, which names the
 * thing and the remedy, and ps_last_errno() the errno of a refused system call, or of a source. Calls that return a
 * pointer return NULL instead.
 *
 * Any thread may use any handle. A handle may be freed once, when no other thread uses it: later use is undefined
 * (builds with debug assertions return PS_INVALID_HANDLE). A server may be freed before its regions, which keep it
 * running; but a manual one must be freed after them.
 *
 * A touch of a page whose bytes cannot be had raises SIGBUS: ps_region_read() returns an error instead. So does
 * ps_region_populate(). In a child of fork(2), the addresses of a region are inaccessible.
 *
 * A callback is a function of the program that the library calls. It must not leave by longjmp(), pthread_exit() or an
 * exception, nor touch a region that the same server fills: it would wait for itself. It may call ps_region_data(),
 * _bytes(), _metric() and _plan(), ps_server_fd(), the calls for errors, budgets and builders, and any for a region of
 * another server; but no region or server can be freed in it, except in `release` of a source.
 *
 * This file is generated: edit crates/pagestitch-capi/src. */

#ifndef PAGESTITCH_H
#define PAGESTITCH_H

#include <stddef.h>
#include <stdint.h>

// The version of the binary interface that this header describes.
#define PS_ABI_VERSION 1

// As a number of bytes of a file: up to its end.
#define PS_TO_END UINT64_MAX

// The answers of calls. An older library may have fewer: a program treats an unknown one as PS_OTHER.
typedef enum {
    // The call has done its work.
    PS_OK = 0,
    // An argument is a null pointer, an empty or overflowing range, or a struct of another size.
    PS_INVALID_ARGUMENT = -1,
    // A handle was freed, or is of another type. Only libraries with debug assertions find this.
    PS_INVALID_HANDLE = -2,
    // The library has panicked, which is a defect of it: report it.
    PS_PANIC = -3,
    // The builder has no chunk.
    PS_NO_CHUNKS = -4,
    // A chunk is empty, or reaches past its source's end.
    PS_INVALID_CHUNK = -5,
    // The region has more bytes or chunks than a region can have.
    PS_TOO_LARGE = -6,
    // An option has a value that cannot be used.
    PS_INVALID_OPTION = -7,
    // An option excludes another one.
    PS_OPTION_CONFLICT = -8,
    // An offset or range lies outside the region, or a write outside the chunks of a file that is shown in place.
    PS_OUT_OF_RANGE = -9,
    // The region is only read: call ps_builder_writable() before the build.
    PS_READ_ONLY = -10,
    // A forked child uses a server or region of its parent.
    PS_FORKED_CHILD = -11,
    // The server cannot serve such a region.
    PS_UNSUITABLE_SERVER = -12,
    // A chunk is memory of another region of the same server.
    PS_NESTED_REGION = -13,
    // A byte would have to be copied, and the builder requires zero-copy.
    PS_NOT_ZERO_COPY = -14,
    // A file is of a sort that does not suit its use.
    PS_UNUSABLE_FILE = -15,
    // Memory cannot be mapped a second time, or is no physical memory to map.
    PS_UNUSABLE_MEMORY = -16,
    // The kernel lacks userfaultfd, or the process may not use it: use ps_server_eager() or ps_server_best().
    PS_NO_USERFAULTFD = -17,
    // The kernel lacks a feature that the call needs.
    PS_UNSUPPORTED = -18,
    // The process lacks a right that the call needs.
    PS_PERMISSION_DENIED = -19,
    // A limit of the process or the system is reached: raise it, or free some of it.
    PS_LIMIT_REACHED = -20,
    // The kernel has no memory.
    PS_OUT_OF_MEMORY = -21,
    // A call or the kernel still uses the thing: let that end first.
    PS_IN_USE = -22,
    // The bytes of a page cannot be had, because its source has failed.
    PS_SOURCE_FAILED = -23,
    // A fault took longer than its limit.
    PS_TIMED_OUT = -24,
    // The system refuses to open, read or write a file.
    PS_IO = -25,
    // A part of the region was unmapped or moved.
    PS_MEMORY_GONE = -26,
    // The server has ended.
    PS_SERVER_STOPPED = -27,
    // The kernel refuses a step for an unknown reason: ps_last_errno() tells more.
    PS_KERNEL = -28,
    // Another reason: ps_last_error() tells more.
    PS_OTHER = -99,
} ps_status;

// The bytes of memory that any number of regions may take together.
typedef struct ps_budget ps_budget;

// Describes a region: chunks, which lie end to end in the order in which they are added, and options.
typedef struct ps_builder ps_builder;

// A contiguous range of addresses. A page has its bytes from its first touch on.
typedef struct ps_region ps_region;

// Answers the page faults of regions.
typedef struct ps_server ps_server;

// A source that the program implements. Any thread calls its functions, several at once. They are callbacks: see the
// top.
typedef struct {
    // sizeof(ps_source).
    size_t size;
    // Passed to each function.
    void *ctx;
    // The number of bytes that it has.
    uint64_t bytes;
    // Fills `count` bytes at `into` with those from `offset` on. Returns 0, or an errno if not all of them can be
    // had: a touch of the page is then SIGBUS.
    int (*read_at)(void *ctx, uint64_t offset, void *into, size_t count);
    // Called once, when no region uses the source any more, and never in a forked child. May be NULL.
    void (*release)(void *ctx);
    // The preferred size of a read in bytes, for compressed or remote sources. 0: no preference.
    uint64_t granularity;
    // The name in errors and plans. May be NULL.
    const char *name;
} ps_source;

// A piece of memory. It has the layout of struct iovec.
typedef struct {
    // Its address, of any alignment.
    const void *start;
    // Its length in bytes.
    size_t bytes;
} ps_piece;

// A range of a file.
typedef struct {
    // The offset of its first byte.
    uint64_t offset;
    // Its length in bytes. PS_TO_END: up to the end of the file.
    uint64_t bytes;
} ps_extent;

// Options of a pool. Zero stands for the default in all fields but `size`.
typedef struct {
    // sizeof(ps_pool_options).
    size_t size;
    // The number of workers. Default: one for each CPU, on its CPU.
    size_t workers;
    // The number of threads up to which workers that a source holds up are replaced.
    size_t max_workers;
    // A fault that takes so many milliseconds ends in SIGBUS. Default: no limit.
    uint64_t fault_timeout_ms;
    // A fault that takes so many milliseconds is logged.
    uint64_t warn_after_ms;
} ps_pool_options;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The version of the binary interface. It grows with each incompatible change. A program compares it with the
// value that it was built for, PS_ABI_VERSION.
uint32_t ps_abi_version(void);

// Makes a budget, for ps_builder_budget(). Pages beyond it leave, and come back with the same bytes when they are
// touched.
int ps_budget_new(uint64_t bytes,
                  ps_budget **budget);

// The bytes that its regions take now. 0 also stands for an error.
uint64_t ps_budget_resident(const ps_budget *budget);

// Gives the budget up. Its regions keep it. NULL is ignored.
int ps_budget_free(ps_budget *budget);

// Starts a description.
int ps_builder_new(ps_builder **builder);

// Gives a description up. NULL is ignored.
int ps_builder_free(ps_builder *builder);

// Names the region in errors and plans.
int ps_builder_name(ps_builder *builder, const char *name);

// Allows writes to the region, by ps_region_write() and through ps_region_data_mut(). Sources in memory and files
// that are not in place stay as they are.
int ps_builder_writable(ps_builder *builder);

// Starts each later chunk in a page of its own. A part of a file in place keeps its offset within the page, so that
// its pages can be shown: ps_region_offset_of() tells where a chunk starts. Bytes between chunks are zeros, and beside
// a part in place those of the file: ps_region_write() refuses to change them, and a write by pointer changes the file.
int ps_builder_page_aligned(ps_builder *builder);

// Makes a byte that would have to be copied an error of the build.
int ps_builder_require_zero_copy(ps_builder *builder);

// Bounds the memory of the region, which is only read then. The sources are read again for pages that have left, and
// must have the same bytes.
int ps_builder_budget(ps_builder *builder,
                      const ps_budget *budget);

// Gives forked children the region, with pages of their own. Without it, its addresses are inaccessible there. Needs
// ps_server_pool(), CAP_SYS_PTRACE and Linux 6.6.
int ps_builder_inherit_on_fork(ps_builder *builder);

// Has the kernel record which pages are written, for ps_region_changes(). Needs Linux 6.7.
int ps_builder_track_changes(ps_builder *builder);

// Reserves addresses for so many bytes, so that ps_region_append() can add memory later. Not with ps_server_eager().
int ps_builder_capacity(ps_builder *builder,
                        uint64_t bytes);

// Has `tell` called for each page whose bytes cannot be had, with its offset in the region and the reason, which is
// valid until `tell` returns. `ctx` stays valid until the region is freed, or the builder if it builds none. The
// thread that has tried to fill the page calls `tell`: one of the library, that of ps_region_populate(),
// ps_region_read(), ps_server_serve() or ps_builder_build(), or with ps_server_inline() the touching thread in its
// handler of SIGBUS. So `tell` waits for no lock that the program holds in such a call. It is a callback: see the top.
int ps_builder_on_page_failure(ps_builder *builder,
                               void (*tell)(void *ctx, uint64_t offset, const char *reason),
                               void *ctx);

// Adds a piece of memory. The program keeps it valid and unchanged until the region is freed.
int ps_add_memory(ps_builder *builder, const void *start, size_t bytes);

// Adds a part of a file, which is read on first touch. `bytes` may be PS_TO_END.
int ps_add_file(ps_builder *builder, const char *path, uint64_t offset, uint64_t bytes);

// Adds a part of a file, whose whole pages are shown in place: without a copy, and with all later changes of
// the file. `bytes` may be PS_TO_END. Call ps_builder_writable() before it to write to the file through the region.
int ps_add_file_in_place(ps_builder *builder,
                         const char *path,
                         uint64_t offset,
                         uint64_t bytes);

// As ps_add_file_in_place(), for an open file or memfd. The descriptor is duplicated.
int ps_add_fd(ps_builder *builder, int fd, uint64_t offset, uint64_t bytes);

// Adds zeros.
int ps_add_hole(ps_builder *builder, uint64_t bytes);

// Adds a source that the program implements. The struct is copied. Its function `release` is called also if this
// call fails, unless the struct is refused: if its pointer, `size`, `read_at` or `name` is wrong.
int ps_add_source(ps_builder *builder,
                  const ps_source *source);

// Adds memory of a shared mapping of this process, in whole pages, whatever file it shows: without a copy. The region
// has a mapping of its own, so that the program may unmap its one.
int ps_add_alias(ps_builder *builder,
                 const void *start,
                 size_t bytes);

// Adds physical memory, through /dev/mem: `address` and `bytes` are whole pages. The program vouches that reads of it
// (and writes, after ps_builder_writable()) disturb neither the kernel nor a device: it is reserved memory, or that
// of a device that allows accesses of any size.
int ps_add_physical(ps_builder *builder,
                    uint64_t address,
                    uint64_t bytes);

// Adds the page frames behind private memory of this process, found by pagemap and mapped through /dev/mem, in whole
// pages: without a copy. The frames are pinned. Until the region is freed, the program keeps the memory mapped where it
// is: no munmap(), no MADV_DONTNEED, no mapping over it. Most kernels refuse it (CONFIG_STRICT_DEVMEM).
int ps_add_frames(ps_builder *builder,
                  const void *start,
                  size_t bytes);

// Builds the region. The builder is empty afterwards, also after an error, and can be used again.
int ps_builder_build(ps_builder *builder, const ps_server *server, ps_region **region);

// Shows pieces of memory as one, read-only: a page is copied from its pieces when it is first touched. The program
// keeps the pieces valid and unchanged until the region is freed.
int ps_region_of_pieces(const ps_server *server,
                        const ps_piece *pieces,
                        size_t count,
                        ps_region **region);

// Shows parts of a memfd (or a file) as one, writable: the same memory, without a copy. Each part is whole pages.
int ps_region_of_memfd(const ps_server *server,
                       int fd,
                       const ps_extent *parts,
                       size_t count,
                       ps_region **region);

// Shows pieces of memory as one, read-only: the same page frames, by pagemap and /dev/mem, without a copy. Each
// piece is whole pages. As ps_add_frames().
int ps_region_of_frames(const ps_server *server,
                        const ps_piece *pieces,
                        size_t count,
                        ps_region **region);

// One line about the last call of this thread that failed: the call, the thing and the remedy. Empty if none
// has failed. Never NULL. Valid until the next failure in this thread, or its end.
const char *ps_last_error(void);

// The errno of the last call of this thread that failed: that of a refused system call, or that a source's `read_at`
// has returned. 0: neither is the reason.
int ps_last_errno(void);

// The address of the first byte, valid until the region is freed. NULL: an error.
const void *ps_region_data(const ps_region *region);

// As ps_region_data(), for writing. NULL: an error, also if the region is only read.
void *ps_region_data_mut(ps_region *region);

// The number of bytes of the region. 0: an error.
size_t ps_region_bytes(const ps_region *region);

// The offset in the region at which a chunk starts. Chunks are numbered from 0, in the order in which they were added.
int ps_region_offset_of(const ps_region *region,
                        size_t chunk,
                        uint64_t *offset);

// Copies bytes out. Bytes that cannot be had are an error, and not SIGBUS. `into` is no memory of the region.
int ps_region_read(const ps_region *region, uint64_t offset, void *into, size_t bytes);

// Copies bytes in, if the region is writable. `from` is no memory of the region.
int ps_region_write(ps_region *region, uint64_t offset, const void *from, size_t bytes);

// Fills the absent pages of a range, in this thread; more threads of the library help with a large one. An error if
// bytes cannot be had. Of files in place, it reads the pages of the range from the disk, and no others. `bytes` may be
// PS_TO_END.
int ps_region_populate(const ps_region *region,
                       uint64_t offset,
                       uint64_t bytes);

// Asks the server to fill the absent pages of a range, and does not wait. `bytes` may be PS_TO_END. Of files
// in place, it has the server read the pages of the range from the disk, and no others.
int ps_region_prefetch(const ps_region *region, uint64_t offset, uint64_t bytes);

// Tries the pages of a range again whose bytes could not be had. `bytes` may be PS_TO_END.
int ps_region_retry_failed(const ps_region *region, uint64_t offset, uint64_t bytes);

// Adds memory at the end of a region that ps_builder_capacity() has reserved addresses for. The program keeps it valid
// and unchanged until the region is freed. `offset`, which may be NULL, becomes its offset in the region.
int ps_region_append(ps_region *region,
                     const void *start,
                     size_t bytes,
                     uint64_t *offset);

// Calls `tell`, in this thread, with each range that was written since the last such call. Needs
// ps_builder_track_changes(). Read the bytes afterwards: they then include each write that was told. A transfer that
// pins pages of the region has ended before the call, or its bytes may be missed: an O_DIRECT read, an io_uring, a
// process_vm_writev(2), a write to /proc/PID/mem. A buffered read(2) and ps_region_write() are safe.
int ps_region_changes(ps_region *region,
                      void (*tell)(void *ctx, uint64_t offset, uint64_t bytes),
                      void *ctx);

// Writes the pages that were written since the last such call to an open file, each at its offset in the region. All
// other pages are holes. Replaces the contents of the file, and does not sync it.
int ps_region_save_changes(ps_region *region,
                           int fd);

// Writes the plan as text: how the pages of each chunk come, and why. As snprintf(3): `into` has room for `room` bytes
// with the zero at the end, and may be NULL if `room` is 0. `bytes` becomes the length of the whole text.
int ps_region_plan(const ps_region *region,
                   char *into,
                   size_t room,
                   size_t *bytes);

// Reads a counter of the region, such as "faults" or "bytes_copied".
int ps_region_metric(const ps_region *region, const char *name, uint64_t *value);

// The name of a counter, numbered from 0. NULL after the last one.
const char *ps_metric_name(size_t number);

// Frees the region: its addresses become invalid. Waits for reads of its sources. NULL is ignored. A callback cannot
// call it, except for `release` of a source.
int ps_region_free(ps_region *region);

// Starts a pool of worker threads. `options` may be NULL.
int ps_server_pool(const ps_pool_options *options, ps_server **server);

// A pool, or the eager server where the process may not use userfaultfd.
int ps_server_best(ps_server **server);

// The touching thread itself fills the page, in a handler of SIGBUS: for sources in memory, holes and files.
// A handler of SIGBUS that the process installs later has to call the one before it, and a thread that blocks SIGBUS
// cannot touch absent pages.
int ps_server_inline(ps_server **server);

// No faults: ps_builder_build() maps or copies all bytes.
int ps_server_eager(ps_server **server);

// A server without threads, for an event loop: wait for its descriptor, then call ps_server_serve(). The thread
// that serves must not touch the regions. Free it after its regions: without it, a touch of them raises SIGSEGV.
int ps_server_manual(ps_server **server);

// The descriptor of a manual server, readable while faults wait. It belongs to the server. Negative: an error.
int ps_server_fd(const ps_server *server);

// Serves up to `most` faults of a manual server, without waiting for more. One thread serves at a time: others wait.
// A callback cannot call it. `served` may be NULL.
int ps_server_serve(ps_server *server,
                    size_t most,
                    size_t *served);

// Gives the server up. A pool goes on until its last region is freed. A manual server ends now: free its regions
// first. NULL is ignored. A callback cannot call it, except for `release` of a source.
int ps_server_free(ps_server *server);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PAGESTITCH_H */
