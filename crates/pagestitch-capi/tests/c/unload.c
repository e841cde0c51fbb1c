/* A thread loads the library, serves a region inline, and ends. dlclose() must leave the handler of SIGBUS in memory, which
 * a later SIGBUS of the program runs. Its argument: the shared library. */
#include "test.h"
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *path;

static void *use(void *ctx) {
    (void)ctx;
    static const char bytes[] = "bytes";
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    CHECK(library);
    int (*make)(ps_server **), (*end)(ps_server *), (*show)(const ps_server *, const ps_piece *, size_t, ps_region **);
    int (*leave)(ps_region *);
    const void *(*data)(const ps_region *);
    /* As the manual of dlsym(3) does: ISO C converts no pointer to data to one to a function. */
    *(void **)&make = dlsym(library, "ps_server_inline"), *(void **)&end = dlsym(library, "ps_server_free");
    *(void **)&show = dlsym(library, "ps_region_of_pieces"), *(void **)&leave = dlsym(library, "ps_region_free");
    *(void **)&data = dlsym(library, "ps_region_data");
    CHECK(make && end && show && leave && data);
    ps_piece piece = { bytes, sizeof bytes };
    ps_server *server;
    ps_region *region;
    CHECK(!make(&server) && !show(server, &piece, 1, &region));
    CHECK(*(const char *)data(region) == 'b');
    CHECK(!leave(region) && !end(server));
    return library;
}

/* A fault of the program's own. */
static void fault(void) {
    int fd = memfd_create("empty", 0);
    CHECK(fd >= 0);
    volatile char *empty = (volatile char *)mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(empty != MAP_FAILED);
    (void)empty[0];
}

int main(int argc, char **argv) {
    const struct rlimit none = { 0, 0 };
    pthread_t thread;
    void *library;
    int status;
    CHECK(argc == 2);
    path = argv[1];
    CHECK(!pthread_create(&thread, NULL, use, NULL) && !pthread_join(thread, &library));
    CHECK(!dlclose(library));
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        CHECK(!setrlimit(RLIMIT_CORE, &none));
        fault();
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
    return 0;
}
