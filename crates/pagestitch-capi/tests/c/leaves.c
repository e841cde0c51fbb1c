/* A callback that leaves by another way than its return. Its argument is that way. */
#include "test.h"
#include <pthread.h>
#include <setjmp.h>
#include <sys/resource.h>

static jmp_buf target;
static const char *way;

static int leave(void *ctx, uint64_t offset, void *into, size_t count) {
    (void)ctx, (void)offset, (void)into, (void)count;
    if (!strcmp(way, "longjmp"))
        longjmp(target, 1);
    if (!strcmp(way, "pthread_exit"))
        pthread_exit(NULL);
#ifdef __cplusplus
    throw 1;
#else
    abort();
#endif
}

int main(int argc, char **argv) {
    struct rlimit none;
    ps_server *server;
    ps_builder *builder;
    ps_region *region;
    ps_source source;
    CHECK(argc == 2);
    way = argv[1];
    none.rlim_cur = none.rlim_max = 0;
    CHECK(!setrlimit(RLIMIT_CORE, &none));
    memset(&source, 0, sizeof source);
    source.size = sizeof source;
    source.bytes = 4096;
    source.read_at = leave;
    OK(ps_server_pool(NULL, &server));
    OK(ps_builder_new(&builder));
    OK(ps_add_source(builder, &source));
    OK(ps_builder_build(builder, server, &region));
    OK(ps_builder_free(builder));
    if (!setjmp(target))
        ps_region_populate(region, 0, PS_TO_END);
    /* Only longjmp() comes here. Calls still return, and free nothing that the callback uses. */
    FAILS(ps_region_free(region), PS_IN_USE, "longjmp(3)");
    FAILS(ps_server_free(server), PS_IN_USE, "longjmp(3)");
    puts("goes on");
    return 0;
}
